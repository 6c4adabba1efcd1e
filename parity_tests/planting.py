"""Plants bugs in the source and runs the comparison with PyTorch on them."""

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
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.parity import Report, check, optimizer_steps, random_params


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


def edit(function: Callable[..., Any], *texts: str) -> Edit:
    """An edit from old and new texts, alternating."""
    return Edit(function, tuple(zip(texts[::2], texts[1::2], strict=True)))


@contextlib.contextmanager
def planted(edits: tuple[Edit, ...]) -> Iterator[None]:
    """Makes the edits for a while. The function object stays the same, so modules that imported it have the bug too."""
    functions = [inspect.unwrap(edit.function) for edit in edits]
    sound = [function.__code__ for function in functions]
    wrong = [edit.code() for edit in edits]
    try:
        for function, code in zip(functions, wrong, strict=True):
            function.__code__ = code
        jax.clear_caches()  # programs compiled before do not have the bug
        yield
    finally:
        for function, code in zip(functions, sound, strict=True):
            function.__code__ = code
        jax.clear_caches()


SMALL = {"vocab_size": 13, "max_seq_len": 16, "num_layers": 2, "embed_dim": 12, "num_heads": 2, "mlp_dim": 20}
PARTS = {"gradient": ("gradients",), "update": ("updates",), "decoding": ("decoding", "sampling")}
"""What is compared besides the forward pass, by the quantity in which the bug shows first."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A bug, and what `jaxlm.parity.check` must say about it."""

    name: str
    layer: str
    """Pattern of the layer that must be named; * = any, for a bug that is in all of them."""
    cause: str
    """Part of a cause that must be named; with "!" at its end, of the first cause, which must have been tried."""
    edits: tuple[Edit, ...]
    fields: dict[str, Any]
    """Fields of a config in which the bug shows."""
    quantity: str = "activation"
    optimizer: str | None = None
    """The only optimizer to compare."""
    verdict: str = "DIFFERS"

    @property
    def case(self) -> tuple[ModelConfig, tuple[Any, ...], str | None]:
        """The model in which the bug is planted, the parts compared, and the only optimizer among them."""
        return ModelConfig(**{**SMALL, **self.fields}), PARTS.get(self.quantity, ()), self.optimizer


def compared(
    cfg: ModelConfig, parts: tuple[Any, ...], optimizer: str | None, tokens: np.ndarray | None = None
) -> Report:
    """Runs the comparison; of one optimizer only, or on given tokens as `--text` does, if there are any."""
    every = optimizer_steps.OPTIMIZERS
    with mock.patch.object(
        optimizer_steps, "OPTIMIZERS", every if optimizer is None else {optimizer: every[optimizer]}
    ):
        prompt = None if tokens is None else tokens[:, :5]
        return check(cfg, random_params(cfg), tokens, prompt=prompt, draws=1, parts=parts)


@functools.cache
def sound(case: tuple[ModelConfig, tuple[Any, ...], str | None]) -> Report:
    """The comparison without a bug."""
    return compared(*case)


def run(mutation: Mutation, tokens: np.ndarray | None = None) -> Report:
    """Runs the comparison with the bug in place."""
    with planted(mutation.edits):
        return compared(*mutation.case, tokens)


def missed(mutation: Mutation, report: Report) -> list[str]:
    """Lists what the report should say about the bug but does not."""
    first = report.first
    if report.passed or first is None:
        return ["that there is a bug"]
    wrong = []
    if first.quantity != mutation.quantity:
        wrong.append(f"{mutation.quantity}: it says {first.quantity}")
    if not fnmatch.fnmatchcase(first.layer, mutation.layer):
        wrong.append(f"{mutation.layer}: it says {first.layer}")
    if first.verdict != mutation.verdict:
        wrong.append(f"{mutation.verdict}: it says {first.verdict}")
    if not first.inputs_agree:
        wrong.append("that the layer's inputs agree")
    if mutation.optimizer is not None and f" by {mutation.optimizer} " not in first.where:
        wrong.append(f"{mutation.optimizer}: it says {first.where}")
    if named(mutation, report) is None:
        wrong.append(f"{mutation.cause}: it says {'; '.join(first.causes)}")
    return wrong


def named(mutation: Mutation, report: Report) -> str | None:
    """Returns the cause that names the bug, if the report has it."""
    causes = report.first.causes if report.first else ()
    wanted, tried, _ = mutation.cause.partition("!")
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
