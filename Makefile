# Two commands do everything on a fresh machine: `make train` and `make test`.
#
# PYTHON       the interpreter that makes .venv (3.11 or later)
# PRESET       what `make train` trains; `jaxlm presets` lists them
# TORCH_INDEX  a package index to take torch from besides pip's own. The default build for Linux brings CUDA
#              (gigabytes); PyTorch's installation page names an index of CPU builds (about 200 MB).
PYTHON ?= python3
PRESET ?= nanogpt-cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests are mostly compiled by one thread each: a process a core, each with half of the files until the other has none
# left. They compile much and compute little: machine code without optimisation takes a third off their time.
PYTEST := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" \
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
PYTEST_X64 := JAX_ENABLE_X64=1 $(PYTEST)
INSTALLED := pyproject.toml constraints.txt

.PHONY: train test test-slow lint format bench bench-decode clean

train: .venv/.train
	$(BIN)/jaxlm train $(PRESET)

test: .venv/.test
	$(PYTEST) -m "not x64 and not slow"
	$(PYTEST_X64) -m "x64 and not slow"

test-slow: .venv/.test
	$(BIN)/python -m pytest -m "not x64 and slow" tests
	$(PYTEST) --dist load -m "not x64 and slow" parity_tests
	$(PYTEST_X64) --dist load -m "x64 and slow"

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.test
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/optimizers.py

bench-decode: .venv/.test
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/decode.py --context

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One stamp an extra: a second call installs nothing.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.train: $(INSTALLED) | .venv/bin/python
	$(PIP) --editable .
	touch $@

.venv/.test: $(INSTALLED) | .venv/bin/python
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[parity,test]"
	touch .venv/.train $@

.venv/.dev: $(INSTALLED) | .venv/bin/python
	$(PIP) --editable ".[dev]"
	touch .venv/.train $@
