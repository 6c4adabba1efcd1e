"""What the command reads and prints: options by tyro, tables by rich, JSON."""

import contextlib
import io
import json
import re
from typing import Any, TypeVar

import tyro

from jaxlm.errors import UserError

_Options = TypeVar("_Options")


def parse_options(
    cls: type[_Options], arguments: list[str], usage: str, default: _Options | None = None, others: bool = False
) -> _Options:
    """The options of `jaxlm USAGE` by tyro, whose boxed refusals become one line; `others` passes unknown ones over.

    Raises:
      UserError: options that are unknown, missing or of the wrong type.
    """
    errors, given = io.StringIO(), tyro.MISSING_NONPROP if default is None else default
    prog = f"jaxlm {usage}"
    try:
        with contextlib.redirect_stderr(errors):
            if others:
                return tyro.cli(cls, args=arguments, prog=prog, default=given, return_unknown_args=True)[0]
            return tyro.cli(cls, args=arguments, prog=prog, default=given)
    except SystemExit as end:
        if not end.code:
            raise
    raise UserError(f"{_unboxed(errors.getvalue())}; see jaxlm {usage.split()[0]} --help")


def _unboxed(refusal: str) -> str:
    """What tyro's box says, and its first guess at what was meant, in one line."""
    sections: list[list[str]] = [[]]
    for line in refusal.splitlines():
        content = line.strip("│ ")
        if not content.strip("─-"):
            sections.append([])
        elif not line.startswith(("╭", "╰")):
            sections[-1].append(content)
    if "╭" not in refusal:  # no UTF-8: the title stands in a section of its own
        sections = sections[1:]
    message = re.sub(r"^Error parsing \w+: ", "", " ".join(sections[0]).rstrip("."))
    guesses = [section[1] for section in sections if section and section[0].startswith("Perhaps")]
    return f"{message}; perhaps you meant {guesses[0]}" if guesses else message


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout."""
    import rich.console
    import rich.table

    table = rich.table.Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)
