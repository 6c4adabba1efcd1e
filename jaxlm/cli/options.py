"""What the commands read: options from the command line, by tyro, and text files."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict, TypeVar, get_args, get_origin

import docstring_parser
import tyro

from jaxlm.config import ExperimentConfig, MeshConfig, OptimConfig
from jaxlm.config.data import Paths, as_paths
from jaxlm.config.model import idle_fields
from jaxlm.config.optim import idle_optim_fields
from jaxlm.data.files import decode_utf8
from jaxlm.data.reading import read_regular
from jaxlm.errors import UserError

_Options = TypeVar("_Options")

Given = dict[str, Any]
"""The options that the user gave, by field name; those of a nested config are a dict of their own."""

TEXTS = {"prompt", "text", "stop", "separator", "field"}
"""Options that are text that is read or written. Other words are names and paths, in the system's own form."""

RunArgument = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
"""The folder of the run that a command is about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonOption:
    """What every reporting command takes."""

    json: bool = False
    """Print one JSON object on stdout instead of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions(JsonOption):
    """What every command on a checkpoint takes."""

    step: int | None = None
    """Step of the checkpoint to use; None = the one with the lowest validation loss."""


NO_MESH = MeshConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOption:
    """What commands that compute with a model on several devices take."""

    mesh: MeshConfig = NO_MESH

    def in_context(self) -> contextlib.AbstractContextManager[object]:
        """In the block, the mesh is in context.

        Raises:
          UserError: the mesh does not fit the devices; it names a coordinator, which is for training.
        """
        if self.mesh.coordinator is not None:
            raise UserError(
                f"mesh.coordinator = {self.mesh.coordinator!r} is for jaxlm train: leave it out; one process uses all "
                "devices of its machine"
            )
        from jaxlm.sharding.mesh import make_mesh, use_mesh

        return use_mesh(make_mesh(self.mesh))


def parse_options(
    cls: type[_Options],
    arguments: list[str],
    command: str,
    defaults: Callable[[Given], _Options] | None = None,
) -> _Options:
    """The options of `jaxlm COMMAND`, which the fields of a dataclass declare; --help prints them and exits.

    An option that is not given has its value in `defaults(given)`, so a default may depend on what is given (on the
    preset, say). Without `defaults` it has the default of its field.

    Raises:
      UserError: an option is unknown, missing or of the wrong type.
    """
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
    own = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    required = {field.name for field in fields if field.name not in own and not _is_nested(field)}
    rest = [argument for argument in arguments if argument not in ("-h", "--help")]
    asks_help = len(rest) < len(arguments)
    # tyro fills in the defaults of a dataclass. Of a TypedDict it returns only the keys that were given, and those that
    # may be given several times.
    typed = _typed_dict(cls, set() if asks_help else required)
    given = _as_utf8(_without_empty(cls, _run_tyro(typed, rest, command, _empty_paths(cls))))
    base = own if defaults is None else vars(defaults(given))
    if asks_help:
        shown = _with_tuples(cls, {name: _as_dict(value) for name, value in base.items() if name not in required})
        _run_tyro(_typed_dict(cls, required, described=True), ["--help"], command, shown)
    return cls(**base | {name: _changed(base.get(name), value) for name, value in given.items()})


def _is_nested(field: dataclasses.Field) -> bool:
    """Whether the options of a field are those of a dataclass of its own."""
    return dataclasses.is_dataclass(_unannotated(field.type)[0])


def _has_paths(field: dataclasses.Field) -> bool:
    """Whether an option may be given several times, for paths."""
    return _unannotated(field.type)[0] == Paths


def _empty_paths(cls: Any) -> Given:
    """No path for each option that may be given several times: tyro needs a default to add to."""
    fields = dataclasses.fields(cls)
    nested = {field.name: _empty_paths(_unannotated(field.type)[0]) for field in fields if _is_nested(field)}
    return {name: given for name, given in nested.items() if given} | {
        field.name: () for field in fields if _has_paths(field)
    }


def _without_empty(cls: Any, given: Given) -> Given:
    """What was given without the paths that were not."""
    nested = {field.name: _unannotated(field.type)[0] for field in dataclasses.fields(cls) if _is_nested(field)}
    paths = {field.name for field in dataclasses.fields(cls) if _has_paths(field)}
    return {
        name: _without_empty(nested[name], value) if name in nested else value
        for name, value in given.items()
        if not (name in paths and value == ())
    }


def _as_utf8(given: Given) -> Given:
    """What was given, with texts as the UTF-8 that was typed: Python reads a command line by the locale."""

    def typed(text: str) -> str:
        try:
            return os.fsencode(text).decode() if re.search("[\udc80-\udcff]", text) else text
        except UnicodeError:  # no UTF-8 at all, which who reads the text refuses
            return text

    def read(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _as_utf8(value)
        if name not in TEXTS or value is None:
            return value
        return typed(value) if isinstance(value, str) else tuple(typed(text) for text in value)

    return {name: read(name, value) for name, value in given.items()}


def _with_tuples(cls: Any, shown: Given) -> Given:
    """Defaults in which all paths are tuples, as tyro takes them."""
    result = dict(shown)
    for field in dataclasses.fields(cls):
        if field.name in shown and _is_nested(field):
            result[field.name] = _with_tuples(_unannotated(field.type)[0], shown[field.name])
        elif field.name in shown and _has_paths(field):
            result[field.name] = as_paths(shown[field.name])
    return result


def _unannotated(hint: Any) -> tuple[Any, ...]:
    """A type and what Annotated adds to it."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)


def _typed_dict(cls: Any, required: set[str], described: bool = False) -> Any:
    """A dataclass as a TypedDict, whose keys carry the docstrings of the fields if it is to be `described`."""
    docs = {}
    if described:  # tyro itself would keep the line breaks of the source
        bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
        parsed = [param for base in bases for param in docstring_parser.parse_from_object(base).params]
        docs = {param.arg_name: " ".join((param.description or "").split()) for param in parsed}
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        kind, *metadata = _unannotated(field.type)
        if _has_paths(field):
            kind, metadata = tuple[str, ...], [*metadata, tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")]
        if _is_nested(field):
            kind = _typed_dict(kind, set(), described)
        elif described:
            metadata.insert(0, tyro.conf.arg(help=docs.get(field.name), help_behavior_hint=_show_default))
        hint = Annotated[kind, *metadata] if metadata else kind
        keys[field.name] = Required[hint] if field.name in required else hint
    options = TypedDict(cls.__name__, keys, total=False)  # type: ignore[misc]
    options.__doc__ = (cls.__doc__ or "").split("\n\n")[0]
    return options


def _show_default(default: str) -> str:
    """What stands after the description of an option."""
    return f"(default: {default})".replace("\n", "\\n") if default else ""


def _as_dict(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _changed(base: Any, given: Any) -> Any:
    """A value as given; a nested config, with its given fields changed."""
    if not isinstance(given, dict):
        return given
    return dataclasses.replace(base, **{name: _changed(getattr(base, name), value) for name, value in given.items()})


def _run_tyro(options: Any, arguments: list[str], command: str, default: Given) -> Given:
    """What tyro reads from the arguments; its refusals, which are boxes of text, become one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(options, args=arguments, prog=f"jaxlm {command}", default=default)
    except SystemExit as end:
        if not end.code:
            raise
    message = _one_line(errors.getvalue())
    if message.startswith("Unrecognized options") and any(
        Path(word.rstrip(",")).exists() for word in message.split()[2:]
    ):
        message += "; of several files, each needs the option before it"  # a shell makes many words of *.txt
    raise UserError(f"{message}; see jaxlm {command} --help")


def _one_line(refusal: str) -> str:
    """The message in tyro's box, with the options that are missing or its first guess at what was meant."""
    sections: list[list[str]] = [[]]
    for line in refusal.replace("│", " ").splitlines():
        if not line.strip(" ─-"):
            sections.append([])
        elif not line.startswith(("╭", "╰")):
            sections[-1].append(line)
    if "╭" not in refusal:  # where there is no UTF-8, the title is a section of its own
        sections = sections[1:]
    message = " ".join(" ".join(sections[0]).split()).rstrip(".").removeprefix("Error parsing ")
    for section in filter(None, sections):
        title = section[0].strip()
        names = [line.split()[0].rstrip(",") for line in section if re.match(" {6}[^ ]", line)]
        if title.startswith("Missing from"):
            message = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        elif title == "Unrecognized options:":
            message += f"; unknown: {', '.join(names)}"
        elif title.startswith("Perhaps you meant"):
            message += f"; perhaps you meant {names[0]}"
    return message


def with_kinds(base: ExperimentConfig, given: Given) -> ExperimentConfig:
    """The config with the given model family, optimizer and schedule.

    What another family, optimizer or schedule does not read, and the arguments of the optimizer before, go back to
    their defaults; so does the decay from or to adam, which has a default of its own.
    """
    family = given["model"].get("family", base.model.family)
    model = dataclasses.replace(base.model, family=family, **idle_fields(base.model, family))
    optim = base.optim
    optimizer = given.get("optim", {}).get("name", optim.name)
    if optimizer != optim.name:
        decay = None if "adam" in (optimizer, optim.name) else optim.weight_decay
        idle = idle_optim_fields(optimizer)
        optim = dataclasses.replace(optim, name=optimizer, arguments=(), weight_decay=decay, **idle)
    schedule = given.get("optim", {}).get("schedule", optim.schedule)
    if schedule != optim.schedule:
        optim = dataclasses.replace(
            optim, schedule=schedule, decay_share=OptimConfig.decay_share, schedule_steps=OptimConfig.schedule_steps
        )
    return dataclasses.replace(base, model=model, optim=optim)


def read_text(name: str) -> str:
    """A UTF-8 file to the last character, newlines as they are, without a byte-order mark; "-" is stdin.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    where = "stdin" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else read_regular(Path(name))
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}): give an existing UTF-8 text, or - for stdin"
        ) from None
    text = decode_utf8(content, where)
    if text.startswith("\ufeff"):
        warnings.warn(f"{where} begins with a byte-order mark, which is left out", stacklevel=2)
    return text.removeprefix("\ufeff")
