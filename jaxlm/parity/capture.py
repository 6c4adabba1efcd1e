"""What goes into and comes out of every named layer, in JAX and in torch, in the order in which it is computed."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from jaxlm.convert.tensors import to_array

if TYPE_CHECKING:
    import torch


class Event(NamedTuple):
    """A value passes into or out of a layer: its first floating-point argument, or the first array it returns."""

    layer: str
    """Path of the layer, such as block_0/mlp; the model itself is ""."""
    side: Literal["in", "out"]
    call: int = 0
    """The how-manieth call of the layer."""

    def __str__(self) -> str:
        what = f"the {'input' if self.side == 'in' else 'output'} of {self.layer or 'the model'}"
        return f"{what} (call {self.call + 1})" if self.call else what


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The values of some events, in the order in which they came."""

    events: tuple[Event, ...] = dataclasses.field(metadata={"static": True})
    values: tuple[Any, ...]
    owners: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    """The layers that have parameters of their own."""

    def by_event(self) -> dict[Event, np.ndarray]:
        """Each event's value."""
        return {event: np.asarray(value) for event, value in zip(self.events, self.values, strict=True)}


def traced(function: Callable[..., Any]) -> Callable[..., tuple[Any, Trace]]:
    """The function, returning besides its result what passed through the Linen modules it calls.

    May be compiled or differentiated. What is called inside a transformation of its own (nn.scan, nn.remat, jax.jit)
    does not leave it and is not seen.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Trace]:
        seen: list[tuple[Event, Any]] = []
        owners: list[str] = []
        calls: Counter[str] = Counter()
        active: list[str] = []
        here = get_opaque_trace_state(convention="flax")

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = "/".join(context.module.path)
            apart = get_opaque_trace_state(convention="flax") != here
            if context.method_name != "__call__" or apart or layer in active:  # one that shares its owner's scope
                return call(*args, **kwargs)
            number = calls[layer]
            calls[layer] += 1
            active.append(layer)
            _note(seen, Event(layer, "in", number), (args, kwargs))
            result = call(*args, **kwargs)
            _note(seen, Event(layer, "out", number), result)
            active.pop()
            if any(not isinstance(leaf, Mapping) for leaf in context.module.variables.get("params", {}).values()):
                owners.append(layer)
            return result

        with nn.intercept_methods(intercept):
            result = function(*args, **kwargs)
        return result, Trace(tuple(event for event, _ in seen), tuple(value for _, value in seen), tuple(owners))

    return run


def _note(seen: list[tuple[Event, Any]], event: Event, tree: Any) -> None:
    value = next((leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)), None)
    if value is not None:
        seen.append((event, value))


def is_float(leaf: Any) -> bool:
    """Whether it is a floating-point array."""
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)


@contextlib.contextmanager
def hooked(module: "torch.nn.Module") -> Iterator[dict[Event, np.ndarray]]:
    """Fills the dictionary it gives with what passes through the module and all it holds, by torch's names."""
    import torch

    seen: dict[Event, np.ndarray] = {}
    calls: Counter[Event] = Counter()

    def first_tensor(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree, is_leaf=torch.is_tensor)
        return next((leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.is_floating_point()), None)

    def note(name: str, side: Literal["in", "out"], tree: Any) -> None:
        value, event = first_tensor(tree), Event(name, side)
        if value is not None:
            seen[event._replace(call=calls[event])] = to_array(value)
        calls[event] += 1

    handles = []
    for name, layer in module.named_modules():
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, "in", (args, kwargs)), with_kwargs=True
            ),
            layer.register_forward_hook(lambda _, args, result, name=name: note(name, "out", result)),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
