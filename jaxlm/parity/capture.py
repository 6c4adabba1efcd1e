"""What enters and leaves every named layer, in JAX and in torch, in the order of computation."""

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
    """A value enters or leaves a layer: the first floating-point array among its arguments, or among its results."""

    layer: str
    """The path of the layer, such as block_0/mlp; the model itself is ""."""
    side: Literal["in", "out"]
    call: int = 0
    """Index of this call of the layer, from 0."""

    def __str__(self) -> str:
        what = f"the {'input' if self.side == 'in' else 'output'} of {self.layer or 'the model'}"
        return f"{what} (call {self.call + 1})" if self.call else what


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The values of some events, in the order of computation."""

    events: tuple[Event, ...] = dataclasses.field(metadata={"static": True})
    values: tuple[Any, ...]
    owners: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    """The layers that have parameters of their own."""

    def by_event(self) -> dict[Event, np.ndarray]:
        """Each event's value."""
        return {event: np.asarray(value) for event, value in zip(self.events, self.values, strict=True)}


def traced(function: Callable[..., Any]) -> Callable[..., tuple[Any, Trace]]:
    """Makes the function also return what passed through the Linen modules it calls.

    The new function may be compiled or differentiated. Modules called inside a transformation of its own (nn.scan,
    nn.remat, jax.jit) are not captured: their values exist only inside that transformation.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Trace]:
        captured: list[tuple[Event, Any]] = []
        owners: list[str] = []
        calls: Counter[str] = Counter()
        active: list[str] = []
        here = get_opaque_trace_state(convention="flax")

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = "/".join(context.module.path)
            inside_transformation = get_opaque_trace_state(convention="flax") != here
            shares_scope = layer in active  # jaxlm's Norm and the Linen norm inside it are one layer
            if context.method_name != "__call__" or inside_transformation or shares_scope:
                return call(*args, **kwargs)
            number = calls[layer]
            calls[layer] += 1
            active.append(layer)
            _note(captured, Event(layer, "in", number), (args, kwargs))
            result = call(*args, **kwargs)
            _note(captured, Event(layer, "out", number), result)
            active.pop()
            if any(not isinstance(leaf, Mapping) for leaf in context.module.variables.get("params", {}).values()):
                owners.append(layer)
            return result

        with nn.intercept_methods(intercept):
            result = function(*args, **kwargs)
        return result, Trace(
            tuple(event for event, _ in captured), tuple(value for _, value in captured), tuple(owners)
        )

    return run


def _note(captured: list[tuple[Event, Any]], event: Event, tree: Any) -> None:
    value = next((leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)), None)
    if value is not None:
        captured.append((event, value))


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array."""
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)


@contextlib.contextmanager
def hooked(module: "torch.nn.Module", names: Mapping[str, str] | None = None) -> Iterator[dict[Event, np.ndarray]]:
    """Yields a dictionary that fills with what passes through the module and its submodules, under torch's names.

    Args:
      names: only these submodules, each under the name that it is given here.
    """
    import torch

    captured: dict[Event, np.ndarray] = {}
    calls: Counter[Event] = Counter()

    def first_tensor(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree, is_leaf=torch.is_tensor)
        return next((leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.is_floating_point()), None)

    def note(name: str, side: Literal["in", "out"], tree: Any) -> None:
        value, event = first_tensor(tree), Event(name, side)
        if value is not None:
            captured[event._replace(call=calls[event])] = to_array(value)
        calls[event] += 1

    handles = []
    for name, layer in module.named_modules():
        if names is not None and name not in names:
            continue
        name = name if names is None else names[name]
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, "in", [*args, *kwargs.values()]), with_kwargs=True
            ),
            layer.register_forward_hook(lambda _, args, result, name=name: note(name, "out", result)),
        ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
