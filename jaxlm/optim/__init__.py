"""Optimizers and schedules as Optax transformations."""

from jaxlm.optim.adafactor import adafactor, relative_step, scale_by_factored_rms
from jaxlm.optim.adam import adam, adamw, scale_by_adam
from jaxlm.optim.adamsn import adamsn, scale_by_adamsn
from jaxlm.optim.build import build_optimizer, state_bytes
from jaxlm.optim.param_kinds import ParamKind, decay_mask, param_kinds
from jaxlm.optim.schedules import build_schedule
from jaxlm.optim.sgd import sgd
from jaxlm.optim.transforms import skip_nonfinite, skipped_steps

__all__ = [
    "ParamKind",
    "adafactor",
    "adam",
    "adamsn",
    "adamw",
    "build_optimizer",
    "build_schedule",
    "decay_mask",
    "param_kinds",
    "relative_step",
    "scale_by_adam",
    "scale_by_adamsn",
    "scale_by_factored_rms",
    "sgd",
    "skip_nonfinite",
    "skipped_steps",
    "state_bytes",
]
