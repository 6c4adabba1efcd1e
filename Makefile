# Two commands do everything on a fresh machine: `make train` and `make test`.
#
# PYTHON       the interpreter that makes the virtual environment (3.11 or later)
# PRESET       what `make train` trains; `jaxlm presets` lists them
# TORCH_INDEX  a package index to take torch from besides pip's own. The default build for Linux brings CUDA
#              (gigabytes); PyTorch's installation page names an index of CPU builds (about 200 MB).
#
# `make test-jax PYTHON=python3.12` runs tests/ without torch, on the newest pinned JAX for that Python, in
# .venv-jax-python3.12. QUICK=1 tests operations and training only, in 32 bits.
PYTHON ?= python3
PRESET ?= nanogpt-cpu
TORCH_INDEX ?=

QUICK ?=

BIN := .venv/bin
# Python compiles what it imports; of all that is installed, that is a fifth.
PIP := python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
JAX_VENV := .venv-jax-$(notdir $(PYTHON))
# Most tests compile with one thread: so one process a core, each with half of the files until the other has none left.
# Tests compile much and compute little: machine code without optimisation takes a third off their time. Of what is
# left, the emitters of fused loops are half; from jaxlib 0.11 on there are no others, and it ends at the flag.
PYTEST := python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
EMITTERS = import jaxlib; print("--xla_cpu_use_fusion_emitters=false" if jaxlib.__version__ < "0.11" else "")
FAST = XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
	$$($(1)/python -c '$(EMITTERS)')" $(1)/$(PYTEST)
INSTALLED := pyproject.toml constraints.txt
# A PYTHON given on the command line must be that of the virtual environment.
SAME_PYTHON := $(if $(filter command,$(firstword $(origin PYTHON))),same-python)

.PHONY: train test test-jax test-slow same-python lint format audit bench bench-decode bench-growing clean

train: .venv/.train $(SAME_PYTHON)
	$(BIN)/jaxlm train $(PRESET)

test: .venv/.test $(SAME_PYTHON)
	$(call FAST,$(BIN)) -m "not x64 and not slow"
	JAX_ENABLE_X64=1 $(call FAST,$(BIN)) -m "x64 and not slow"

test-jax: $(JAX_VENV)/.test
	$(call FAST,$(JAX_VENV)/bin) -m "not x64 and not slow" $(if $(QUICK),tests/ops tests/training,tests)
	$(if $(QUICK),,JAX_ENABLE_X64=1 $(call FAST,$(JAX_VENV)/bin) -m "x64 and not slow" tests)

test-slow: .venv/.test
	$(BIN)/python -m pytest -m "not x64 and slow" tests
	$(call FAST,$(BIN)) --dist load -m "not x64 and slow" parity_tests
	JAX_ENABLE_X64=1 $(call FAST,$(BIN)) --dist load -m "x64 and slow"

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tests of security, and the pinned packages against the known vulnerabilities (docs/security.md).
audit: .venv/.audit
	$(BIN)/python scripts/audit.py

bench: .venv/.test
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/optimizers.py

bench-decode: .venv/.test
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/decode.py --context

bench-growing: .venv/.test
	$(BIN)/python benchmarks/growing.py

clean:
	rm -rf .venv .venv-jax-* .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One stamp an extra: a second call installs nothing.
.venv/bin/python:
	$(PYTHON) -m venv .venv

same-python: | .venv/bin/python
	@[ "$$($(PYTHON) --version)" = "$$($(BIN)/python --version)" ] || { \
		echo "error: .venv has $$($(BIN)/python --version), not $$($(PYTHON) --version): run make clean first"; exit 2; }

$(JAX_VENV)/bin/python:
	$(PYTHON) -m venv $(JAX_VENV)

$(JAX_VENV)/.test: $(INSTALLED) | $(JAX_VENV)/bin/python
	$(JAX_VENV)/bin/$(PIP) --editable ".[test]"
	touch $@

.venv/.train: $(INSTALLED) | .venv/bin/python
	$(BIN)/$(PIP) --editable .
	touch $@

.venv/.test: $(INSTALLED) | .venv/bin/python
	$(BIN)/$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[parity,test]"
	touch .venv/.train $@

.venv/.dev: $(INSTALLED) | .venv/bin/python
	$(BIN)/$(PIP) --editable ".[dev]"
	touch .venv/.train $@

.venv/.audit: .venv/.test
	$(BIN)/$(PIP) --editable ".[audit]"
	touch $@
