"""Bugs planted in the source, and what the comparison with PyTorch says of them."""

import contextlib
import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import jax

from jaxlm.config import ModelConfig
from jaxlm.parity import Report, check, random_params, updates


@dataclasses.dataclass(frozen=True)
class Edit:
    """Texts of a function, each found there once, and what stands there instead."""

    function: Callable[..., Any]
    changes: tuple[tuple[str, str], ...]

    def code(self) -> CodeType:
        """The function compiled from its file with the changes made; the file stays as it is."""
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


def edit(function: Callable[..., Any], *texts: str) -> Edit:
    """Old and new texts in turn."""
    return Edit(function, tuple(zip(texts[::2], texts[1::2], strict=True)))


@contextlib.contextmanager
def planted(edits: tuple[Edit, ...]) -> Iterator[None]:
    """Runs with the edits made. The function object is the same, so whoever imported it has the bug too."""
    functions = [inspect.unwrap(edit.function) for edit in edits]
    sound = [function.__code__ for function in functions]
    wrong = [edit.code() for edit in edits]
    try:
        for function, code in zip(functions, wrong, strict=True):
            function.__code__ = code
        jax.clear_caches()  # what was compiled has no bug
        yield
    finally:
        for function, code in zip(functions, sound, strict=True):
            function.__code__ = code
        jax.clear_caches()


SMALL = {"vocab_size": 13, "max_seq_len": 16, "num_layers": 2, "embed_dim": 12, "num_heads": 2, "mlp_dim": 20}
PARTS = {"gradient": ("gradients",), "update": ("updates",), "decoding": ("decoding", "sampling")}
"""What is compared besides the forward pass, by the quantity in which a bug shows first."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A bug, and what `jaxlm.parity.check` must say of it."""

    name: str
    layer: str
    """Pattern of the layer to be named; * = any, where the bug is in all."""
    cause: str
    """Part of a cause to be named; with "!" at its end, of the first one, which was tried out."""
    edits: tuple[Edit, ...]
    fields: dict[str, Any]
    """Of the config, where the bug shows."""
    quantity: str = "activation"
    optimizer: str | None = None

    @property
    def case(self) -> tuple[ModelConfig, tuple[Any, ...], str | None]:
        """The model it is planted in, the parts compared, and the one optimizer among them."""
        return ModelConfig(**{**SMALL, **self.fields}), PARTS.get(self.quantity, ()), self.optimizer


def compared(cfg: ModelConfig, parts: tuple[Any, ...], optimizer: str | None) -> Report:
    """The comparison, of one optimizer only if it is given."""
    names = updates.OPTIMIZERS if optimizer is None else {optimizer: updates.OPTIMIZERS[optimizer]}
    with mock.patch.object(updates, "OPTIMIZERS", names):
        return check(cfg, random_params(cfg), draws=1, parts=parts)


@functools.cache
def sound(case: tuple[ModelConfig, tuple[Any, ...], str | None]) -> Report:
    """The comparison without a bug."""
    return compared(*case)


def run(mutation: Mutation) -> Report:
    """The comparison with the bug in place."""
    with planted(mutation.edits):
        return compared(*mutation.case)


def missed(mutation: Mutation, report: Report) -> list[str]:
    """What the report should say of the bug, and does not."""
    first = report.first
    if report.passed or first is None:
        return ["that there is a bug"]
    wrong = []
    if first.quantity != mutation.quantity:
        wrong.append(f"{mutation.quantity}: it says {first.quantity}")
    if not fnmatch.fnmatchcase(first.layer, mutation.layer):
        wrong.append(f"{mutation.layer}: it says {first.layer}")
    if not first.inputs_agree:
        wrong.append("that the layer's inputs agree")
    if mutation.optimizer is not None and f" by {mutation.optimizer} " not in first.where:
        wrong.append(f"{mutation.optimizer}: it says {first.where}")
    if named(mutation, report) is None:
        wrong.append(f"{mutation.cause}: it says {'; '.join(first.causes)}")
    return wrong


def named(mutation: Mutation, report: Report) -> str | None:
    """The cause that names the bug."""
    causes = report.first.causes if report.first else ()
    wanted, tried, _ = mutation.cause.partition("!")
    if tried:
        causes = tuple(cause for cause in causes[:1] if "(tried" in cause)
    return next((cause for cause in causes if wanted in cause), None)


def _find(code: CodeType, name: str) -> CodeType:
    found = [inner for inner in _all(code) if inner.co_qualname == name]
    if len(found) != 1:
        raise ValueError(f"{name} is there {len(found)} times, not once")
    return found[0]


def _all(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _all(inner)
