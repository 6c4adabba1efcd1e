"""The published numbers, at full length: minutes, so `make test-slow`. docs/log.md has the runs behind the bounds."""

import dataclasses

import pytest

from jaxlm import run
from jaxlm.presets import preset

pytestmark = pytest.mark.slow


def val_loss(tmp_path, **optim):
    config = preset("nanogpt-cpu")
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, **optim),
        train=dataclasses.replace(config.train, eval_every=2000, checkpoint_every=2000),
    )
    return run.train(config, tmp_path / "run").val_loss


def test_nanogpt_cpu_reaches_its_loss(tmp_path):
    assert val_loss(tmp_path) <= 1.76


def test_nanogpt_cpu_with_the_settings_of_the_published_run(tmp_path):
    assert val_loss(tmp_path, learning_rate=1e-3, warmup_steps=100, weight_decay=0.1) <= 1.91
