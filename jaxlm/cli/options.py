"""What the command reads and prints: options by tyro, tables by rich, JSON."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from jaxlm.config.experiment import ExperimentConfig, idle_optim_fields
from jaxlm.config.model import Family, idle_fields
from jaxlm.data.files import decode_utf8
from jaxlm.errors import UserError

_Options = TypeVar("_Options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonOption:
    """What every reporting command takes."""

    json: bool = False
    """Print one JSON object on stdout instead of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions(JsonOption):
    """What every command on a run takes."""

    step: int | None = None
    """Checkpoint to use; default: the one with the lowest validation loss."""


@dataclasses.dataclass(frozen=True)
class _KindOptions:
    family: Annotated[Family, tyro.conf.arg(name="model.family")]
    optimizer: Annotated[str, tyro.conf.arg(name="optim.name")]


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


def of_kinds(base: ExperimentConfig, arguments: list[str], usage: str) -> ExperimentConfig:
    """The config that options change, of the --model.family and with the --optim.name they ask for.

    What another family or optimizer does not read, and the arguments of the optimizer before, go back to default.
    """
    if asks_help(arguments):
        return base
    kinds = parse_options(_KindOptions, arguments, usage, _KindOptions(base.model.family, base.optim.name), others=True)
    model = dataclasses.replace(base.model, family=kinds.family, **idle_fields(base.model, kinds.family))
    optim = base.optim
    if kinds.optimizer != optim.name:
        optim = dataclasses.replace(optim, name=kinds.optimizer, arguments=(), **idle_optim_fields(kinds.optimizer))
    return dataclasses.replace(base, model=model, optim=optim)


def first_word(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The word before the options, if there is one, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def asks_help(arguments: list[str]) -> bool:
    """Whether the options are only to be listed."""
    return bool({"-h", "--help"} & set(arguments))


def run_word(arguments: list[str], command: str) -> tuple[Path, list[str]]:
    """The run's folder before the options, and the rest.

    Raises:
      UserError: there is none.
    """
    word, rest = first_word(arguments)
    if word is None and not asks_help(rest):
        raise UserError(f"no run given: jaxlm {command} RUN ..., RUN being a folder that `jaxlm train` made")
    return Path(word or ""), rest


def read_text(name: str) -> str:
    """A UTF-8 file to the last character, newlines as they are; "-" is stdin.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    where = "stdin" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}): give an existing UTF-8 text, or - for stdin"
        ) from None
    return decode_utf8(content, where)


def print_json(value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """One JSON object, or a list of them, on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; what looks like rich's markup is text."""
    import rich.console
    import rich.table
    import rich.text

    table = rich.table.Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    rich.console.Console().print(table)
