"""Any two functions, one in JAX and one in torch: where do they part first?"""

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.errors import UserError
from jaxlm.parity import causes
from jaxlm.parity.capture import Event, hooked, is_float, traced
from jaxlm.parity.measure import Pair, measure
from jaxlm.parity.report import Divergence, Report, first_divergence

if TYPE_CHECKING:
    import torch


OUTSIDE = "between the layers"


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
    then copies of it compute, one in float64, and our error may be twice torch's and 4 units in the last place (RMS; 64
    at a single place).
    Else the largest difference decides: 1e-5 of the largest value in float32, 1e-10 in float64.

    Args:
      jax_fn: takes arrays and returns one, such as `lambda x: module.apply(variables, x)`.
      inputs: arrays of numbers, given to both.
      names: path of a Linen module, a/b -> name of the torch module that is to be the same, a.b. None = equal names, or
        else the innermost layers with parameters, in the order of their results. Gradients of parameters are not
        compared.

    Raises:
      UserError: a result that is no floating-point array; a module that cannot be copied, or that drops out or
        normalises by batches in training mode; a name of no layer that was called; without names, layers that cannot be
        paired.
    """
    import torch

    arrays = [np.asarray(jnp.asarray(x)) for x in inputs]  # in the types JAX computes with
    ours = _jax_side(jax_fn, arrays)
    exact = None
    if isinstance(torch_fn, torch.nn.Module):
        _check_mode(torch_fn)
        torch_fn, finer = (_copied(torch_fn) for _ in range(2))  # a call may change a module
        if ours.result.dtype != np.float64:
            wide = [x.astype(np.float64) if is_float(x) else x for x in arrays]
            exact = _torch_side(finer.double(), wide)
    theirs = _torch_side(torch_fn, arrays)
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
        none = failed and Divergence(failed.quantity, OUTSIDE, True, where, causes.HINTS["between"])
        return Report(tuple(rows), none)
    event, divergence = found
    if divergence.layer in ("model", "embedding"):
        divergence = dataclasses.replace(divergence, layer=OUTSIDE)
    counterparts = dict(_paired(ours, theirs, names))
    tried = causes.of_foreign(torch_fn, event, counterparts, ours.values, theirs.values)
    return Report(tuple(rows), dataclasses.replace(divergence, causes=tried))


def _weights(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def _check_mode(module: "torch.nn.Module") -> None:
    """Refuses a module whose result depends on more than its inputs."""
    import torch

    kinds = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)
    for name, layer in module.named_modules():
        if isinstance(layer, kinds) and layer.training and getattr(layer, "p", True):
            raise UserError(f"torch_fn is in training mode with {layer} at {name!r}: call torch_fn.eval() first")


def _copied(module: "torch.nn.Module") -> "torch.nn.Module":
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever a module of others holds
        raise UserError(f"torch_fn cannot be copied ({error}): give a function in place of the module") from None


def _jax_side(function: Callable[..., Any], inputs: Sequence[np.ndarray]) -> Side:
    arrays = [jnp.asarray(x) for x in inputs]
    moving = [i for i, x in enumerate(arrays) if is_float(x)]

    def of_floats(*floats: Any) -> Any:
        given = dict(zip(moving, floats, strict=True))
        result, trace = traced(function)(*(given.get(i, x) for i, x in enumerate(arrays)))
        _check_result(result, is_float(result), "jax_fn")
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
    _check_result(result, torch.is_tensor(result) and result.is_floating_point(), "torch_fn")
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
        what = f"{type(result).__name__} {getattr(result, 'dtype', '')}".strip()
        raise UserError(f"{name} returns {what}, which cannot be compared: return one floating-point array")


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
