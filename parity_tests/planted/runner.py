"""Plants a bug and asks its check: jaxlm's own, or another tool's."""

import fnmatch
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlm.config import ModelConfig
from jaxlm.parity import Report, random_params
from planted.bugs import Bug, Case, missed, named, planted
from planted.checks import CHECKS

Tool = Callable[..., Any]
"""Another project's check: takes (cfg, params), or the subject of a check whose subject is no ModelConfig.

It returns an object with `passed`, and if it can name them `layer` (text) and `causes` (texts).
"""


class Answer(NamedTuple):
    """What a tool says of a bug."""

    caught: bool
    layer: str
    """Where it is; "" = not said."""
    located: bool
    """Whether that is the right layer. A bug that is in all layers cannot be located."""
    cause: str
    """The cause named; "" = none."""
    tried: bool
    """Whether the cause was tried out."""
    wrong: tuple[str, ...]
    """What is missing."""


def tool_of(name: str) -> Tool:
    """The function that MODULE:FUNCTION names.

    Raises:
      ValueError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} names no function ({error}): give MODULE:FUNCTION") from None


@functools.cache
def sound(case: Case, tool: Tool | None = None) -> Any:
    """What a check says without a bug."""
    return _asked(case, tool)


def run(bug: Bug, **options: Any) -> Report:
    """What jaxlm's own check says with the bug in place."""
    with planted(bug.edits):
        return CHECKS[bug.check](bug.case.subject, **dict(bug.case.options), **options)


def ask(bug: Bug, tools: Mapping[str, Tool]) -> Answer:
    """What the check of a bug says of it, and of sound code; `tools` stand for the checks of these names."""
    tool = tools.get(bug.check)
    if not sound(bug.case, tool).passed:
        return Answer(False, "", False, "", False, ("that sound code passes",))
    with planted(bug.edits):
        report = _asked(bug.case, tool)
    if tool is None:
        wrong = tuple(missed(bug, report))
        caught, cause = not report.passed, named(bug, report) or ""
        layer = report.first.layer if report.first else ""
    else:
        caught = not report.passed
        layer, causes = str(getattr(report, "layer", "") or ""), tuple(getattr(report, "causes", ()) or ())
        cause = str(causes[0]) if causes else ""
        wrong = () if caught else ("that there is a bug",)
    located = caught and bug.layer not in ("*", "") and fnmatch.fnmatchcase(layer, bug.layer)
    return Answer(caught, layer, located, cause, "(tried" in cause, wrong)


def _asked(case: Case, tool: Tool | None) -> Any:
    if tool is None:
        return CHECKS[case.check](case.subject, **dict(case.options))
    if isinstance(case.subject, ModelConfig):
        return tool(case.subject, random_params(case.subject))
    return tool(case.subject)
