"""The checks by name. Each takes a subject and returns a `jaxlm.parity.Report`; none asks the code under test."""

from collections.abc import Callable
from typing import Any

from planted.checks import dropout, exports, extension, imports, model, padding, sampling, schedule

CHECKS: dict[str, Callable[..., Any]] = {
    "model": model.check_model,
    "padding": padding.check_padding,
    "dropout": dropout.check_dropout,
    "schedule": schedule.check_schedule,
    "sampling": sampling.check_sampling,
    "extension": extension.check_extension,
    "imports": imports.check_imports,
    "exports": exports.check_exports,
}
