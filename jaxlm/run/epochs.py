"""Epochs and steps: how long a run is, once its data are known."""

import dataclasses
import math

from jaxlm.config import ExperimentConfig
from jaxlm.data.batches import Split
from jaxlm.data.corpus import Corpus


def batches_per_epoch(config: ExperimentConfig, split: Split) -> float:
    """Batches with as many targets as the split has. They are drawn at random, so an epoch is a number of targets."""
    return split.num_targets / (config.train.batch_size * split.targets_per_window)


def with_steps(config: ExperimentConfig, corpus: Corpus) -> ExperimentConfig:
    """The config with the steps that its epochs take, rounded up; unchanged if it has no epochs.

    Raises:
      UserError: a split is too short.
    """
    if config.train.epochs is None:
        return config
    corpus.check_lengths()
    # 2 epochs of 500.0000001 batches are 1,000 steps: the quotient is rounded in float64.
    steps = max(1, math.ceil(config.train.epochs * batches_per_epoch(config, corpus.train) - 1e-6))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
