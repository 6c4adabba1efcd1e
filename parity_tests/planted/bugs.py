"""What a bug is: a change of some functions, a config in which it shows, and what a check must say about it."""

import contextlib
import dataclasses
import fnmatch
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple
from unittest import mock

import jax

from jaxlm.config import ModelConfig

ROOT = Path(__file__).parent.parent.parent
SMALL = {"vocab_size": 13, "max_seq_len": 16, "num_layers": 2, "embed_dim": 12, "num_heads": 2, "mlp_dim": 20}
ROPE: dict[str, Any] = {"position": "rope"}
BARE: dict[str, Any] = {"norm": "rmsnorm", "use_bias": False}
GROUPED: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
GRU, LSTM = ({"family": "recurrent", "cell": cell, "num_heads": 4, "mlp_dim": None} for cell in ("gru", "lstm"))
FLOAT64: dict[str, Any] = {"dtype": "float64", "param_dtype": "float64"}

PARTS = {"gradient": ("gradients",), "update": ("updates",), "decoding": ("decoding", "sampling")}
"""What is compared besides the forward pass, by the quantity in which a bug shows first."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change to a function: texts that occur in it once, each with its replacement."""

    function: Callable[..., Any]
    changes: tuple[tuple[str, str], ...]

    def code(self) -> CodeType:
        """Compiles the function from its file with the changes made; the file itself is not changed."""
        function = inspect.unwrap(self.function)
        path = Path(function.__code__.co_filename)
        lines = path.read_text().splitlines(keepends=True)
        own, start = inspect.getsourcelines(function)
        text = "".join(own)
        for old, new in self.changes:
            if text.count(old) != 1:
                raise ValueError(f"{function.__qualname__} has {old!r} {text.count(old)} times, not once")
            text = text.replace(old, new)
        whole = "".join([*lines[: start - 1], text, *lines[start - 1 + len(own) :]])
        return _find(compile(whole, str(path), "exec", dont_inherit=True), function.__qualname__)

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Makes the edit for a while. The function object stays the same: modules that imported it have the bug too."""
        function = inspect.unwrap(self.function)
        sound, wrong = function.__code__, self.code()
        function.__code__ = wrong
        try:
            yield
        finally:
            function.__code__ = sound

    def to_dict(self) -> dict[str, Any]:
        """The edit as plain JSON types. A file of another package is given by its place in that package."""
        function = inspect.unwrap(self.function)
        file = os.path.relpath(function.__code__.co_filename, ROOT)
        return {
            "function": f"{function.__module__}.{function.__qualname__}",
            "file": file.partition("site-packages/")[2] or file,
            "changes": [{"old": old, "new": new} for old, new in self.changes],
        }


@dataclasses.dataclass(frozen=True)
class TableEdit:
    """A change to a table: another value of one key."""

    table: dict[str, Any]
    key: str
    value: Any
    where: str
    """The table in words."""
    change: tuple[str, str]
    """Old and new text, of the line that changes."""

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Makes the edit for a while."""
        with mock.patch.dict(self.table, {self.key: self.value}):
            yield

    def to_dict(self) -> dict[str, Any]:
        """The edit as plain JSON types."""
        old, new = self.change
        return {"table": f"{self.where}[{self.key!r}]", "changes": [{"old": old, "new": new}]}


def edit(function: Callable[..., Any], *texts: str) -> Edit:
    """An edit from old and new texts, alternating."""
    return Edit(function, tuple(zip(texts[::2], texts[1::2], strict=True)))


@contextlib.contextmanager
def planted(edits: Sequence[Edit | TableEdit]) -> Iterator[None]:
    """Makes the edits for a while. Programs compiled before do not have the bug, so they are forgotten."""
    with contextlib.ExitStack() as stack:
        for one in edits:
            stack.enter_context(one.made())
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


class Case(NamedTuple):
    """A check and what it is given; bugs with equal cases share the result of sound code."""

    check: str
    subject: Any
    options: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A bug, and what the check must say about it."""

    name: str
    what: str
    """The bug in one plain sentence."""
    layer: str
    """Pattern of the layer that must be named; * = any, for a bug that is in all of them."""
    cause: str
    """Part of a cause that must be named; with "!" at its end, of the first cause, which must have been tried."""
    edits: tuple[Edit | TableEdit, ...]
    fields: dict[str, Any]
    """Fields of a config in which the bug shows."""
    check: str = "model"
    """The name of a check in planted/checks."""
    make: Callable[..., Any] = lambda **fields: ModelConfig(**{**SMALL, **fields})
    """Makes the subject of the check from the fields."""
    quantity: str = "activation"
    verdict: str = "DIFFERS"
    options: tuple[tuple[str, Any], ...] = ()
    """Further arguments of the check."""
    where: str = ""
    """Part of the place in words."""

    @property
    def case(self) -> Case:
        """The check that must find the bug, and what it is given."""
        return Case(self.check, self.make(**self.fields), self.options)

    def to_dict(self) -> dict[str, Any]:
        """The bug as plain JSON types."""
        cause, tried, _ = self.cause.partition("!")
        return {
            "name": self.name,
            "what": self.what,
            "edits": [edit.to_dict() for edit in self.edits],
            "check": self.check,
            "fields": self.fields,
            "quantity": self.quantity,
            "verdict": self.verdict,
            "layer": self.layer,
            "cause": cause,
            "cause_is_tried": bool(tried),
        }


def bug(name: str, what: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Bug:
    """A bug that shows in the forward pass of a model."""
    return Bug(name, what, layer, cause, edits, fields)


def later(quantity: str, name: str, what: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Bug:
    """A bug of a model that its forward pass does not show."""
    options = (("parts", PARTS[quantity]),) if quantity in PARTS else ()
    return Bug(name, what, layer, cause, edits, fields, quantity=quantity, options=options)


def of_optimizer(optimizer: str, name: str, what: str, layer: str, cause: str, *edits: Edit) -> Bug:
    """A bug in the step of an optimizer."""
    options = (("parts", PARTS["update"]), ("optimizer", optimizer))
    return Bug(
        name, what, layer, cause, edits, ROPE | BARE, quantity="update", options=options, where=f" by {optimizer} "
    )


def coarse(quantity: str, name: str, what: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Bug:
    """A formula that is right but computed too coarsely: float64 does not show it."""
    return dataclasses.replace(later(quantity, name, what, layer, cause, *edits, **fields), verdict="rounding")


def missed(bug: Bug, report: Any) -> list[str]:
    """Lists what a report of jaxlm's own checks should say about the bug but does not."""
    first = report.first
    if report.passed or first is None:
        return ["that there is a bug"]
    wrong = []
    if first.quantity != bug.quantity:
        wrong.append(f"{bug.quantity}: it says {first.quantity}")
    if not fnmatch.fnmatchcase(first.layer, bug.layer):
        wrong.append(f"{bug.layer}: it says {first.layer}")
    if first.verdict != bug.verdict:
        wrong.append(f"{bug.verdict}: it says {first.verdict}")
    if not first.inputs_agree:
        wrong.append("that the layer's inputs agree")
    if bug.where not in first.where:
        wrong.append(f"{bug.where}: it says {first.where}")
    if named(bug, report) is None:
        wrong.append(f"{bug.cause}: it says {'; '.join(first.causes)}")
    return wrong


def named(bug: Bug, report: Any) -> str | None:
    """Returns the cause that names the bug, if the report has it."""
    causes = report.first.causes if report.first else ()
    wanted, tried, _ = bug.cause.partition("!")
    if tried:
        causes = tuple(cause for cause in causes[:1] if "(tried" in cause)
    return next((cause for cause in causes if wanted in cause), None)


def _find(code: CodeType, name: str) -> CodeType:
    codes = [inner for inner in _all(code) if inner.co_qualname == name]
    if len(codes) != 1:
        raise ValueError(f"{name} is defined {len(codes)} times, not once")
    return codes[0]


def _all(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _all(inner)
