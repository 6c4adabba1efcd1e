"""What may change when a run is resumed, and what config.json keeps of it."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ExperimentConfig
from jaxlm.config.base import difference
from jaxlm.errors import UserError
from jaxlm.optim import build_schedule

FREE_ON_RESUME = {
    "data.path",
    "data.val_path",
    "train.epochs",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.patience",
    "train.checkpoint_every",
    "train.keep",
    "train.max_minutes",
}
"""Fields that a resumed run may change, besides those of `sample` and `mesh`: they do not decide its numbers.

Data that have moved are recognised by their sha256. train.epochs decides them through train.steps.
"""

FREE_AT_THE_START = {"train.batch_size", "train.grad_accum"}
"""Fields that a run may change, too, while none of its steps is saved: it begins again, perhaps in less memory."""

FIXED_OPTIM = {"optim.name", "optim.subset", "optim.arguments", "optim.max_nonfinite"}
"""Fields of the optimizer that decide what its state is."""

RATE_JUMP = 0.01
"""A rate that changes by a larger share, where a run goes on, is told."""

Change = dict[str, Any]
"""{"step", "field", "from", "to"}: from the step on, a field has another value."""


def check_same(config: ExperimentConfig, stored: ExperimentConfig, out: Path, has_begun: bool = True) -> None:
    """Refuses a config that does not continue a run.

    Args:
      has_begun: whether a step of the run is saved.

    Raises:
      UserError: it changes a field that may not change.
    """
    for name, ours, theirs in difference(config, stored):
        # Without decay the optimizer's state has no count of it.
        is_other_state = has_begun and name == "optim.weight_decay" and 0 in (ours, theirs)
        begins_again = not has_begun and name in FREE_AT_THE_START
        if is_other_state or not (_is_free(name) or _is_recorded(name) or begins_again):
            raise UserError(
                f"{out} was trained with {name} = {theirs!r}, not {ours!r}: drop that change, or start a new --out"
            )


def changes(config: ExperimentConfig, stored: ExperimentConfig, step: int) -> list[Change]:
    """The changes of fields that decide the numbers of the run from this step on; config.json keeps them."""
    differences = difference(config, stored)
    return [{"step": step, "field": n, "from": old, "to": new} for n, new, old in differences if _is_recorded(n)]


def _is_free(name: str) -> bool:
    return name in FREE_ON_RESUME or name.startswith(("sample.", "mesh."))


def _is_recorded(name: str) -> bool:
    """Training longer is what resuming is for, and another rate what a diverged run needs."""
    return name == "train.steps" or (name.startswith("optim.") and name not in FIXED_OPTIM)


def with_schedule_of(config: ExperimentConfig, stored: ExperimentConfig) -> ExperimentConfig:
    """The config with the schedule's end where it was in the run.

    Raises:
      UserError: the schedule has no end.
    """
    if config.optim.schedule in ("constant", "rsqrt"):
        raise UserError(
            f"--optim.keep-schedule is for a schedule with an end, and {config.optim.schedule} has none: leave it out"
        )
    end = stored.optim.schedule_steps or stored.train.steps
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule_steps=end))


def tell(found: list[Change], config: ExperimentConfig, stored: ExperimentConfig, keep_schedule: bool = False) -> None:
    """Warns of each change but that of the steps, of a jump in the rate, and of a schedule that ends before the run.

    Args:
      keep_schedule: whether the schedule's end was asked for by that option.
    """
    for change in found:
        if change["field"] != "train.steps" and not (keep_schedule and change["field"] == "optim.schedule_steps"):
            warnings.warn(
                f"from step {change['step']} on, {change['field']} = {change['to']!r} instead of {change['from']!r}; "
                "config.json keeps that",
                stacklevel=4,
            )
    changed = {change["field"] for change in found}
    if not changed or keep_schedule or "optim.learning_rate" in changed:  # a jump that was asked for
        return
    step, end = found[0]["step"], config.optim.schedule_steps
    before, after = (float(build_schedule(c.optim, c.train.steps)(np.int32(step))) for c in (stored, config))
    if abs(after - before) > RATE_JUMP * before:
        is_longer = "train.steps" in changed and "optim.schedule_steps" not in changed
        steps = f"steps = {config.train.steps} instead of {stored.train.steps}"
        when = "later" if config.train.steps > stored.train.steps else "earlier"
        why = f"{steps}: {config.optim.schedule} ends {when}, so "
        fix = "; --optim.keep-schedule keeps the run's own schedule"
        warnings.warn(
            f"{why if is_longer else ''}the learning rate of step {step + 1} is {after:.3g} instead of {before:.3g}"
            f"{fix if is_longer else ''}",
            stacklevel=4,
        )
    elif "train.steps" in changed and end is not None and end < config.train.steps:
        warnings.warn(
            f"the schedule ends at step {end} as before (optim.schedule_steps): --optim.schedule-steps None gives that "
            f"of {config.train.steps} steps",
            stacklevel=4,
        )
