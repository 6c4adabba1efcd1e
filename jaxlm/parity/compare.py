"""Any two functions, one in JAX and one in torch: where do they part first?"""

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.convert.torchref import to_array, to_tensor
from jaxlm.errors import UserError
from jaxlm.parity import causes
from jaxlm.parity.capture import Event, hooked, is_float, traced
from jaxlm.parity.measure import Pair, measure
from jaxlm.parity.report import Divergence, Report, first_divergence

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Side:
    """What one of the two functions computes."""

    values: dict[Event, np.ndarray]
    owners: frozenset[str]
    """The layers that have parameters of their own."""
    result: np.ndarray
    grads: dict[int, np.ndarray]
    """By the number of the input."""


def compare(
    jax_fn: Callable[..., Any],
    torch_fn: "Callable[..., Any] | torch.nn.Module",
    inputs: Sequence[Any],
    names: Mapping[str, str] | None = None,
) -> Report:
    """Compares a function of JAX arrays with one of torch tensors that is meant to be the same, layer by layer.

    Compared are the output of every layer, the result and, where an input is floating-point, the gradient in it of the
    sum of the result times fixed random weights. Layers are the Linen modules that `jax_fn` calls outside of
    transformations (jax.jit, nn.scan and nn.remat hide theirs) and the torch modules inside `torch_fn`, if it is one:
    then a copy of it computes in float64 as well, and our error may be twice torch's and 4 units in the last place.
    Else the largest difference decides: 1e-5 of the largest value in float32, 1e-10 in float64.

    Args:
      jax_fn: takes arrays and returns one, such as `lambda x: module.apply(variables, x)`.
      inputs: arrays of numbers, given to both.
      names: path of a Linen module, a/b -> name of the torch module that is to be the same, a.b. None = equal names, or
        else the innermost layers with parameters, in the order of their results.

    Raises:
      UserError: a result that is no array; a name of no layer that was called; without names, layers that cannot be
        paired.
    """
    import torch

    ours, theirs = _jax_side(jax_fn, inputs), _torch_side(torch_fn, inputs)
    exact = None
    if isinstance(torch_fn, torch.nn.Module) and ours.result.dtype != np.float64:
        wide = [np.asarray(x, np.float64) if is_float(np.asarray(x)) else x for x in inputs]
        exact = _torch_side(copy.deepcopy(torch_fn).double(), wide)
    everything = Pair(ours, theirs, None, exact)

    def row(quantity: str, name: str, values: Pair) -> Any:
        return measure(quantity, name, [values], str(ours.result.dtype))

    events = []
    for event, counterpart in _paired(ours, theirs, names):
        truth = None if exact is None else exact.values[counterpart]
        pair = Pair(ours.values[event], theirs.values[counterpart], None, truth)
        events.append((event, row("activation", event.layer or "the whole", pair)))
    rows = [one for event, one in events if event.side == "out" and event.layer]
    rows.append(row("result", "", everything.map(lambda side: side.result)))
    grads = everything.map(lambda side: side.grads)
    rows += [row("gradient", f"of input {i}", grads.map(operator.itemgetter(i))) for i in ours.grads]
    found = first_divergence("activation", events)
    if found is None:
        failed = next((one for one in rows if not one.passed), None)
        where = "every layer that was seen agrees"
        none = failed and Divergence(failed.quantity, "outside of all layers", True, where, causes.HINTS["model"])
        return Report(tuple(rows), none)
    event, divergence = found
    counterparts = dict(_paired(ours, theirs, names))
    tried = causes.of_foreign(torch_fn, event, counterparts, ours.values, theirs.values)
    return Report(tuple(rows), dataclasses.replace(divergence, causes=tried))


def _weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def _jax_side(function: Callable[..., Any], inputs: Sequence[Any]) -> Side:
    arrays = [jnp.asarray(x) for x in inputs]
    moving = [i for i, x in enumerate(arrays) if is_float(x)]

    def of_floats(*floats: Any) -> Any:
        given = dict(zip(moving, floats, strict=True))
        result, trace = traced(function)(*(given.get(i, x) for i, x in enumerate(arrays)))
        _check_result(result, isinstance(result, jax.Array), "jax_fn")
        return result, trace

    with jax.default_matmul_precision("highest"):
        result, pull, trace = jax.vjp(of_floats, *(arrays[i] for i in moving), has_aux=True)
        grads = pull(jnp.asarray(_weights(result.shape), result.dtype))
    found = {i: np.asarray(grad) for i, grad in zip(moving, grads, strict=True)}
    return Side(trace.by_event(), frozenset(trace.owners), np.asarray(result), found)


def _torch_side(function: "Callable[..., Any] | torch.nn.Module", inputs: Sequence[Any]) -> Side:
    import torch

    tensors = [to_tensor(np.asarray(x)) for x in inputs]
    tensors = [x.long() if x.dtype == torch.int32 else x for x in tensors]
    floats = {i: x.requires_grad_() for i, x in enumerate(tensors) if x.is_floating_point()}
    module = function if isinstance(function, torch.nn.Module) else torch.nn.Module()
    with hooked(module) as seen:
        result = function(*tensors)
    _check_result(result, torch.is_tensor(result), "torch_fn")
    slopes: Sequence[Any] = [None] * len(floats)
    if result.requires_grad and floats:
        weights = torch.from_numpy(_weights(tuple(result.shape))).to(result.dtype)
        slopes = torch.autograd.grad(result, list(floats.values()), weights, allow_unused=True)
    pairs = zip(floats.items(), slopes, strict=True)
    grads = {i: to_array(torch.zeros_like(x) if slope is None else slope) for (i, x), slope in pairs}
    owners = (name for name, layer in module.named_modules() if any(True for _ in layer.parameters(recurse=False)))
    return Side(seen, frozenset(owners), to_array(result), grads)


def _check_result(result: Any, is_array: bool, name: str) -> None:
    if not is_array:
        raise UserError(f"{name} returns {type(result).__name__}, which cannot be compared: return one array")


def _paired(ours: Side, theirs: Side, names: Mapping[str, str] | None) -> list[tuple[Event, Event]]:
    """Our events and theirs, in the order of ours."""
    called, there = ({event.layer for event in side.values} - {""} for side in (ours, theirs))
    if names is None:
        names = {layer: layer.replace("/", ".") for layer in called}
        if not set(names.values()) <= there:
            names = _by_order(ours, theirs)
    for name, known in [(n, called) for n in names] + [(n, there) for n in names.values()]:
        if name and name not in known:
            raise UserError(f"names has {name!r}, a layer that was not called: there were {', '.join(sorted(known))}")
    names = {"": "", **names}
    pairs = [(event, event._replace(layer=names[event.layer])) for event in ours.values if event.layer in names]
    return [(event, other) for event, other in pairs if other in theirs.values]


def _by_order(ours: Side, theirs: Side) -> dict[str, str]:
    mine, other = (
        list(dict.fromkeys(e.layer for e in side.values if e.side == "out" and e.layer in side.owners and e.layer))
        for side in (ours, theirs)
    )
    if len(mine) != len(other):
        raise UserError(
            f"{len(mine)} layers in JAX ({', '.join(mine)}) cannot be paired with {len(other)} in torch "
            f"({', '.join(other)}): give names"
        )
    return dict(zip(mine, other, strict=True))
