"""TrainConfig: how long a run is, and how often it logs, evaluates and saves."""

import dataclasses
import math
from typing import Literal

from jaxlm.config.base import Validated, check_at_least, check_seed
from jaxlm.errors import UserError

Log = Literal["tensorboard", "wandb"]
"""Where the rows of metrics.jsonl go, too; each name is also that of an extra, such as jaxlm[tensorboard]."""

MatmulPrecision = Literal["default", "float32", "tensorfloat32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Validated):
    """How long a training run is, and how often it logs, evaluates and saves. Steps are optimizer steps."""

    steps: int = 2000
    """Optimizer steps of the whole run."""
    epochs: float | None = None
    """Passes over the training split, instead of steps: as many targets as so many times the split has. Batches are
    drawn at random, so a pass reads some text twice and some not at all. None = steps decides."""
    batch_size: int = 12
    """Sequences of an optimizer step, all micro-batches together."""
    grad_accum: int = 1
    """Micro-batches that a batch is cut into: less memory, same gradient."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations; the last step always has one."""
    eval_batches: int | None = None
    """Evaluate on so many batches of batch_size windows, spread evenly over a split: an estimate of its loss. None =
    every target counts, and the loss is exact."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a new best val_loss; None = never."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """How many of the latest checkpoints are kept, besides the one with the best validation loss."""
    seed: int = 0
    """Seed of the initial parameters, the batches and dropout."""
    matmul_precision: MatmulPrecision = "default"
    """How products of float32 are computed in training and its evaluations. default: as JAX does, which on a recent
    NVIDIA GPU is TF32; float32: exactly; tensorfloat32: with 11 bits of each factor where the device can (TF32). On a
    CPU all are float32, and products of bfloat16 (model.dtype) are always what they are."""
    max_minutes: float | None = None
    """Stop cleanly after this wall time, with a checkpoint; None = no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, 1, "steps", "batch_size", "grad_accum", "log_every", "eval_every", "checkpoint_every", "keep"
        )
        check_at_least(self, 1, "eval_batches", "patience")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"epochs = {self.epochs!r} is out of range: give a number above 0, such as 1 or 0.5")
        check_at_least(self, 0, "max_minutes")
        check_seed(self)
        if self.batch_size % self.grad_accum:
            raise UserError(
                f"grad_accum = {self.grad_accum} does not divide batch_size = {self.batch_size}: change one"
            )
