"""Optimizers and schedules as Optax transformations."""

from jaxlm.optim.build import build_optimizer, decay_mask
from jaxlm.optim.schedules import build_schedule

__all__ = ["build_optimizer", "build_schedule", "decay_mask"]
