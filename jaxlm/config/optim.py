"""OptimConfig: the optimizer and its schedule."""

import dataclasses
from typing import Any, Literal

from jaxlm.config.base import FLOAT32_TINY, Validated, check_at_least, check_rate
from jaxlm.errors import UserError

_MOMENTS = {"read_by": ("adam", "adamw", "adamsn")}
_ADAMSN = {"read_by": ("adamsn",)}

SubsetRule = Literal["per_output", "per_input", "auto", "smaller"]
"""Which numbers of a linear map share a second moment in AdamSN; `jaxlm.optim.scale_by_adamsn` has the meanings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Validated):
    """The optimizer and its schedule.

    A field with `read_by` in its metadata is read by these optimizers alone, the others by all. A config always holds
    the number of its weight_decay: None becomes that number at once.
    """

    name: str = "adamw"
    """sgd, adam, adamw, adamsn, adafactor, or the name of any optimizer in Optax. All have decoupled decay by
    weight_decay; adam is adamw, but decays nothing unless a weight_decay is given."""
    learning_rate: float = 1e-3
    """Peak learning rate; adamsn needs about ten times that of adamw."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "rsqrt"] = "cosine"
    """cosine and linear decay to min_lr_ratio of the peak at the last step; wsd (warm-up, stable, decay) keeps the peak
    and decays linearly over the last steps (decay_share); rsqrt falls as 1/sqrt(step) after the warm-up."""
    schedule_steps: int | None = None
    """The last step of a schedule that decays; from there on the rate stays. None = train.steps."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly: step t (from 0) uses peak * (t + 1) / (warmup_steps + 1)."""
    min_lr_ratio: float = 0.1
    """Final rate of cosine, linear and wsd as a share of the peak."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which wsd decays."""
    weight_decay: float | None = None
    """Decoupled decay, times the rate, on matrices only; None = 0.1, but 0 for adam."""
    b1: float = dataclasses.field(default=0.9, metadata=_MOMENTS)
    """Decay rate of the first moment (adam, adamw, adamsn)."""
    b2: float = dataclasses.field(default=0.99, metadata={"read_by": (*_MOMENTS["read_by"], "adafactor")})
    """Decay rate of the second moment (adam, adamw, adamsn, adafactor)."""
    eps: float = dataclasses.field(default=1e-8, metadata={"read_by": (*_MOMENTS["read_by"], "adafactor")})
    """Added to sqrt(v_hat); in adafactor, to v_hat."""
    subset: SubsetRule = dataclasses.field(default="auto", metadata=_ADAMSN)
    """Which numbers of a linear map share a second moment in adamsn: the inputs of each output (per_output), the
    outputs of each input (per_input), or per_output if there are at least as many outputs as inputs, as its authors do
    (auto), or the other way round, which keeps one number for each entry of the smaller dimension (smaller)."""
    adam_lr_ratio: float = dataclasses.field(default=0.1, metadata=_ADAMSN)
    """Rate of all parameters that are not linear maps in adamsn, and of all decay, as a share of the learning rate."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the optimizer, NAME=VALUE each: momentum=0.9 nesterov=true (sgd), mu_dtype=bfloat16."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None = no clipping."""
    max_nonfinite: int = 0
    """How many steps in a row may be skipped because their gradient is not finite; one more ends the run with an error.
    A skipped step changes neither the parameters nor the optimizer, and the schedule does not count it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", 0.0 if self.name == "adam" else 0.1)
        check_at_least(self, 0, "learning_rate", "warmup_steps", "min_lr_ratio", "weight_decay", "adam_lr_ratio")
        check_at_least(self, 0, "max_nonfinite")
        check_at_least(self, 1, "schedule_steps")
        # Where a gradient is 0, eps alone keeps the update from being 0 / 0.
        check_at_least(self, FLOAT32_TINY, "eps", "clip_norm")
        check_rate(self, "b1", "b2")
        for name, default in idle_optim_fields(self.name).items():
            if getattr(self, name) != default:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} is not read by {self.name}: leave it out, or pass the optimizer "
                    "an argument of its own by arguments"
                )
        if self.min_lr_ratio > 1:
            raise UserError(f"min_lr_ratio = {self.min_lr_ratio!r} is above 1: give a share of the peak rate")
        if self.schedule_steps is not None and self.schedule in ("constant", "rsqrt"):
            raise UserError(
                f"schedule_steps = {self.schedule_steps} is not read by schedule = {self.schedule!r}, which has no "
                "end: leave it out"
            )
        if not 0 < self.decay_share <= 1:
            raise UserError(f"decay_share = {self.decay_share!r} is out of range: give 0 < decay_share <= 1")
        if self.schedule != "wsd" and self.decay_share != OptimConfig.decay_share:
            raise UserError(
                f"decay_share = {self.decay_share!r} is not read by schedule = {self.schedule!r}: leave it out, or "
                "give schedule = 'wsd'"
            )


def optimizer_fields(name: str) -> tuple[str, ...]:
    """The fields that an optimizer reads besides those that all read; an optimizer of Optax reads none of them."""
    return tuple(field.name for field in dataclasses.fields(OptimConfig) if name in field.metadata.get("read_by", ()))


def idle_optim_fields(name: str) -> dict[str, Any]:
    """The fields of OptimConfig that an optimizer does not read, with their defaults."""
    fields = [field for field in dataclasses.fields(OptimConfig) if "read_by" in field.metadata]
    return {field.name: field.default for field in fields if name not in field.metadata["read_by"]}
