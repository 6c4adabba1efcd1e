"""The benchmarks against PyTorch: their model computes the presets' function, and each of them runs."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import jaxlm
import torchref

FOLDER = Path(jaxlm.__file__).parent.parent / "benchmarks"

NANOGPT = """
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config == GPTConfig(16, 65, 1, 4, 48, 0.0, False)
        self.wte, self.head = torch.nn.Embedding(65, 48), torch.nn.Linear(48, 65)

    def forward(self, idx, targets=None):
        logits = self.head(self.wte(idx))
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
"""What a nanoGPT folder has for the benchmark: the two classes and how they are called."""


@pytest.fixture
def script(monkeypatch):
    """The names of a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


def run(name, *options, **environment):
    """What a script prints on stdout; its exit code must be 0."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}  # on a busy machine threads of torch wait long
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["nanogpt-cpu", "chargpt", "shakespeare-char", "gpt2-124m", "llama-char"])
def test_the_fused_model_is_that_of_the_config(script, name):
    cfg = script("train_step")["setting"](name, True).model
    cfg = dataclasses.replace(cfg, num_layers=2, window=cfg.window and (5, None))
    generator = torch.Generator().manual_seed(0)
    reference, model = torchref.build_model(cfg), script("torch_models")["FusedTransformer"](cfg)
    state = {}
    for key, value in reference.state_dict().items():
        state[key] = value.normal_(0, 0.3, generator=generator)  # in place: of the reference too
    for i in range(cfg.num_layers):
        for leaf in ("weight", "bias") if cfg.use_bias else ("weight",):
            place = f"blocks.{i}.attention."
            parts = [state.pop(f"{place}{part}.{leaf}") for part in ("query", "key", "value")]
            state[f"{place}qkv.{leaf}"] = torch.cat(parts)
    model.load_state_dict(state)
    tokens = torch.randint(cfg.vocab_size, (3, cfg.max_seq_len), generator=generator)
    logits = [module(tokens).detach().numpy() for module in (model, reference)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_the_first_line_names_the_contestant_that_was_fastest_round_by_round(script):
    rows = {
        "jaxlm": {"seconds_a_step": [1, 2, 4]},
        "torch": {"seconds_a_step": [2, 3, 4], "jaxlm_times_as_fast": [2, 1.5, 1]},
        "hf": {"seconds_a_step": [1.5, 5, 5], "jaxlm_times_as_fast": [1.5, 2.5, 1.25]},
        "hf-compiled": {"seconds_a_step": [1.25, 6, 5], "jaxlm_times_as_fast": [1.25, 3, 1.25]},
        "torch-compiled": {"not_available": "no compiler"},
    }
    headline = script("train_step")["headline"]
    told = "p: the fastest of PyTorch is Hugging Face, compiled; jaxlm is 1.25 (1.25 to 3.00) times as fast"
    assert headline("p", {"contestants": rows}) == told
    rest = {name: rows[name] for name in ("jaxlm", "torch-compiled")}
    assert headline("p", {"contestants": rest}) == "p: no contestant of PyTorch ran"


@pytest.mark.slow
def test_a_training_step_is_timed_and_what_cannot_run_is_named(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    numbers = tmp_path / "numbers.json"
    told = run(
        *("train_step", "--smoke", "--rounds", "2", "--steps", "40", "--json", numbers, "--against", tmp_path),
        *("--contestants", "torch", "torch-compiled", "nanogpt"),
        CXX="/nowhere/c++",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    rows = json.loads(numbers.read_text())["presets"]["nanogpt-cpu"]["contestants"]
    assert list(rows) == ["jaxlm", "torch", "torch-compiled", "nanogpt"]
    assert "InvalidCxxCompiler" in rows.pop("torch-compiled")["not_available"]
    for row in rows.values():
        assert len(row["seconds_a_step"]) == len(row["jaxlm_times_as_fast"]) == 2
        assert 0.5 < row["loss"] < 3  # ln 65 = 4.2 at first: all of them learn
    assert rows["jaxlm"]["jaxlm_times_as_fast"] == [1, 1]
    assert told.splitlines()[1].startswith("nanogpt-cpu: the fastest of PyTorch is ")
    assert "torch.nn, compiled      not available: InductorError: InvalidCxxCompiler" in told


def test_a_folder_without_nanogpt_is_refused(tmp_path):
    command = [sys.executable, str(FOLDER / "train_step.py"), "--smoke", "--against", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("there is no model.py; give the folder of a copy of nanoGPT")


@pytest.mark.slow
def test_every_contestant_trains(tmp_path):
    numbers = tmp_path / "numbers.json"
    run("train_step", "--smoke", "--preset", "nanogpt-cpu", "llama-char", "--json", numbers)
    found = json.loads(numbers.read_text())["presets"]
    for preset in ("nanogpt-cpu", "llama-char"):
        rows = found[preset]["contestants"]
        assert list(rows) == ["jaxlm", "torch", "torch-compiled", "hf", "hf-compiled"]
        assert all("seconds_a_step" in row for row in rows.values()), rows


@pytest.mark.slow
def test_forward_passes_are_timed_and_their_memory_is_planned(tmp_path):
    numbers = tmp_path / "numbers.json"
    told = run("forward", "--smoke", "--json", numbers)
    report = json.loads(numbers.read_text())
    rows = report["sizes"]["12x64"]["contestants"]
    assert list(rows) == ["jaxlm", "hf", "hf-compiled", "torch", "torch-compiled"]
    assert all(len(row["jaxlm_times_as_fast"]) == 1 for row in rows.values()), rows
    assert rows["jaxlm"]["jaxlm_times_as_fast"] == [1]
    assert 0 < report["memory"]["bytes"]["32"] < report["memory"]["bytes"]["64"]
    assert "jaxlm times as fast" in told


@pytest.mark.slow
def test_every_sampler_samples(tmp_path):
    numbers = tmp_path / "numbers.json"
    every = ["jaxlm generate_naive", "jaxlm stream", "Hugging Face generate", "Hugging Face compiled"]
    every += ["Hugging Face naive", "torchref cached", "torchref naive"]
    told = run("decode", "--smoke", "--json", numbers, "--contestants", *every)
    report = json.loads(numbers.read_text())
    for rows in (report["batches"]["2"]["contestants"], report["prefill"]["1"]["contestants"]):
        assert all(len(row["first_token_seconds"]) == 1 for row in rows.values()), rows
    assert list(report["batches"]["2"]["contestants"]) == ["jaxlm generate", *every]
    assert "GB/s" in told
    assert "generate_naive ms" in run("decode", "--context", "32", "--rounds", "1")
