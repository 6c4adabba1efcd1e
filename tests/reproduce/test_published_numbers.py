"""The published numbers, at full length: minutes, so `make test-slow`. docs/log.md has the runs behind the bounds."""

import dataclasses
import statistics

import pytest

from jaxlm.config.presets import preset
from jaxlm.run.training import train

pytestmark = pytest.mark.slow


def val_loss(tmp_path, name="nanogpt-cpu", seed=0, **optim):
    config = preset(name)
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, **optim),
        train=dataclasses.replace(config.train, seed=seed, eval_every=2000, checkpoint_every=2000),
    )
    return train(config, tmp_path / f"run-{seed}").val_loss


def test_nanogpt_cpu_reaches_its_loss(tmp_path):
    """One seed, or one order of rounding, is up to 0.01 from another."""
    assert statistics.mean(val_loss(tmp_path, seed=seed) for seed in range(3)) <= 1.76


def test_nanogpt_cpu_with_the_settings_of_the_published_run(tmp_path):
    assert val_loss(tmp_path, learning_rate=1e-3, warmup_steps=100, weight_decay=0.1) <= 1.91


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"name": "adamsn", "learning_rate": 4.5e-2}, 1.80),
        ({"name": "adafactor", "learning_rate": 6e-3, "arguments": ("momentum=0.9", "clipping_threshold=1")}, 1.78),
    ],
    ids=["adamsn", "adafactor"],
)
def test_half_the_optimizer_state_reaches_nearly_its_loss(tmp_path, fields, bound):
    assert val_loss(tmp_path, **fields) <= bound


@pytest.mark.parametrize(("name", "bound"), [("bigram", 2.50), ("embedding-bigram", 2.49), ("single-head", 2.39)])
def test_the_baselines_of_stats_305_reach_their_loss(tmp_path, name, bound):
    assert val_loss(tmp_path, name) <= bound
