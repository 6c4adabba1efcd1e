"""Runs that end early and go on: signals during evaluation, readers that leave."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxlm.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.run import checkpoint
from jaxlm.run.folder import load_run
from jaxlm.run.metrics import OF_CLOCKS
from jaxlm.run.progress import Progress
from jaxlm.run.training import train

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory, shakespeare):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(shakespeare.read_text()[:30_000])
    return ExperimentConfig(
        preset="test",
        model=ModelConfig(family="embedding_bigram", vocab_size=58, max_seq_len=32, embed_dim=8),
        data=DataConfig(path=str(path)),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=STEPS, batch_size=4, log_every=2, eval_every=4, checkpoint_every=6),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config, out)
    return out


def rows(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_CLOCKS} for row in lines]


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 12])
def test_a_signal_during_an_evaluation_saves_and_the_next_session_evaluates(config, whole, tmp_path, monkeypatch, step):
    """Bitwise the uninterrupted run: parameters, losses of the checkpoints, rows in their order."""
    out, show = tmp_path / "stopped", Progress.evaluating

    def interrupted(self, at, share=0.0):
        show(self, at, share)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "evaluating", interrupted)
        outcome = train(config, out)
    assert (outcome.step, outcome.signum) == (step, signal.SIGTERM)
    assert checkpoint.steps(out / "checkpoints")[-1] == step
    assert [row["step"] for row in rows(out) if "val_loss" in row] == [s for s in (4, 8, 12) if s < step]
    outcome = train(config, out, resume=True)
    assert (outcome.step, outcome.signum) == (STEPS, None)
    assert rows(out) == rows(whole)
    jax.tree.map(np.testing.assert_array_equal, load_run(out, STEPS).params, load_run(whole, STEPS).params)
    best = checkpoint.best_step(out / "checkpoints")
    assert best == checkpoint.best_step(whole / "checkpoints") == STEPS


def options(config, out, **changes):
    given = {"family": "embedding_bigram", "embed_dim": 8, "max_seq_len": 32}
    given = {f"model.{name}": value for name, value in given.items()}
    given |= {"data.path": config.data.path, "optim.warmup_steps": 2, "sample.max_new_tokens": 5, "out": out, **changes}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "jaxlm", "train", "tiny", *words, "--model.no-tie-embeddings"]


def test_a_run_outlives_the_readers_of_its_output(config, tmp_path):
    """`jaxlm train 2>&1 | head -2`: the run trains to its end, and its exit code says so."""
    out = tmp_path / "run"
    command = options(config, out, **{"train.steps": 30, "train.log_every": 1, "train.eval_every": 10})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    process.stdout.close()
    assert process.wait(120) == 0
    assert any(line.startswith("step 1/30") for line in lines)
    assert checkpoint.steps(out / "checkpoints")[-1] == 30
    assert (out / "samples/step-30.txt").exists()


@pytest.mark.slow
def test_a_hangup_saves_even_when_the_terminal_is_gone(config, tmp_path):
    out = tmp_path / "run"
    command = options(config, out, **{"train.steps": 10_000_000, "train.eval_every": 1_000_000})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not process.stdout.readline().startswith("step 1/"):
        assert process.poll() is None
    process.stdout.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert len(checkpoint.steps(out / "checkpoints")) == 1
