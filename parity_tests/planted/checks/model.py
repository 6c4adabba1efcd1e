"""A model against torchref: `jaxlm.parity.check` under random parameters, in as few parts as a bug needs."""

from unittest import mock

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.parity import Report, check, optimizer_steps, random_params


def check_model(
    cfg: ModelConfig,
    parts: tuple[str, ...] = (),
    optimizer: str | None = None,
    tokens: np.ndarray | None = None,
) -> Report:
    """Runs the comparison; of one optimizer only, or on given tokens as `--text` does, if there are any."""
    every = optimizer_steps.OPTIMIZERS
    with mock.patch.object(
        optimizer_steps, "OPTIMIZERS", every if optimizer is None else {optimizer: every[optimizer]}
    ):
        prompt = None if tokens is None else tokens[:, :5]
        return check(cfg, random_params(cfg), tokens, prompt=prompt, draws=1, parts=parts)
