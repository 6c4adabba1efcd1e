"""Any two functions, one in JAX and one in torch: where do they first diverge?"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.errors import UserError
from jaxlm.parity import causes
from jaxlm.parity.capture import Event, hooked, is_float, traced
from jaxlm.parity.measure import SINGLE, Results, Row, measure
from jaxlm.parity.report import Divergence, Report, first_divergence, first_failed_row

if TYPE_CHECKING:
    import torch


OUTSIDE = "between the layers"
"""What the report calls a place outside all layers."""

MORE = (1, 4, 16)
"""Inputs over which rounding errors are averaged, as long as nothing but rounding fails."""

CHANGE = 1e-3
"""The largest relative change of the further inputs: the function is the same there, its rounding is not."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """What one of the two functions computes from one set of inputs."""

    values: dict[Event, np.ndarray]
    owners: frozenset[str]
    """The layers that have parameters of their own."""
    result: np.ndarray
    grads: dict[int, np.ndarray]
    """The gradient in each floating-point input, by the number of the input."""


def compare(
    jax_fn: Callable[..., Any],
    torch_fn: "Callable[..., Any] | torch.nn.Module",
    inputs: Sequence[Any],
    names: Mapping[str, str] | None = None,
) -> Report:
    """Compares a function of JAX arrays with a function of torch tensors that should be the same, layer by layer.

    It compares the output of every layer, the result and, for each floating-point input, the gradient of the sum of the
    result times fixed random weights. Layers are the Linen modules that `jax_fn` calls outside transformations
    (jax.jit, nn.scan and nn.remat hide theirs) and the torch modules inside `torch_fn`, if it is a module. Then copies
    of it compute, one of them in float64, and JAX's rounding error may be twice torch's plus 4 units in the last place
    (RMS; 64 for a single value). A few numbers can miss that by bad luck, so before only rounding fails, inputs that
    differ by a thousandth are compared too. For a plain function the largest difference decides: 1e-5 of the
    largest value in float32, 1e-10 in float64.

    Args:
      jax_fn: takes arrays and returns one, such as `lambda x: module.apply(variables, x)`.
      torch_fn: the same in torch. Of an object with `logits`, as transformers returns it, those are compared; of a
        tuple its first entry.
      inputs: arrays of numbers, given to both.
      names: maps the path of a Linen module, a/b, to the name of its counterpart in torch, a.b. None = layers of equal
        names, or if there are none, the innermost layers with parameters, in the order of their results. Gradients of
        parameters are not compared.

    Raises:
      UserError: a result that is not a floating-point array; a module that cannot be copied, or that in training mode
        uses dropout or batch statistics; a name of a layer that was not called; layers that cannot be paired without
        names.
    """
    import torch

    arrays = [np.asarray(jnp.asarray(x)) for x in inputs]  # in the types JAX computes with
    if isinstance(torch_fn, torch.nn.Module):
        _check_mode(torch_fn)
    rng = np.random.default_rng(0)
    results: list[Results] = []
    for count in MORE:
        while len(results) < count:
            results.append(_computed(jax_fn, torch_fn, arrays if not results else _changed(arrays, rng)))
        report = _report(torch_fn, results, names)
        if report.passed or not _is_rounding(report):
            break
    return report


def _computed(jax_fn: Callable[..., Any], torch_fn: Any, arrays: Sequence[np.ndarray]) -> Results:
    import torch

    in_jax, truth = _in_jax(jax_fn, arrays), None
    if isinstance(torch_fn, torch.nn.Module):
        torch_fn, exact = (_copied(torch_fn) for _ in range(2))  # a call may change a module
        if in_jax.result.dtype != np.float64:
            truth = _in_torch(exact.double(), [x.astype(np.float64) if is_float(x) else x for x in arrays])
    return Results(in_jax, _in_torch(torch_fn, arrays), None, truth)


def _changed(arrays: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Inputs near the given ones; those that are not floating-point stay as they are."""
    return [(x * (1 + CHANGE * rng.uniform(-1, 1, x.shape))).astype(x.dtype) if is_float(x) else x for x in arrays]


def _is_rounding(report: Report) -> bool:
    """Whether what fails is so small, and torch so exact, that it may be rounding."""
    failed = [row for row in report.rows if not row.passed]
    return all(row.torch_error is not None and row.ulp <= SINGLE for row in failed)


def _report(torch_fn: Any, results: list[Results], names: Mapping[str, str] | None) -> Report:
    first = results[0]
    dtype = str(first.jax.result.dtype)

    def row(quantity: str, name: str, of: Callable[[Computed], Any], torch_of: Callable[[Computed], Any]) -> Row:
        draws = [
            Results(of(one.jax), torch_of(one.torch), None, one.torch_float64 and torch_of(one.torch_float64))
            for one in results
        ]
        return measure(quantity, name, draws, dtype)

    counterparts = _paired(first.jax, first.torch, names)
    events = [
        (event, row("activation", event.layer or "the whole", _value(event), _value(counterpart)))
        for event, counterpart in counterparts.items()
    ]
    rows = [one for event, one in events if event.side == "out" and event.layer]
    rows.append(row("result", "", *2 * [lambda computed: computed.result]))
    rows += [row("gradient", f"of input {i}", *2 * [functools.partial(_grad, i)]) for i in first.jax.grads]
    first_event = first_divergence("activation", events)
    if first_event is None:
        failed = first_failed_row(rows)
        where = "every layer that was captured agrees"
        outside = failed and Divergence(failed.quantity, OUTSIDE, True, where, causes.HINTS["between"])
        return Report(tuple(rows), outside)
    event, failed_row, divergence = first_event
    if failed_row not in rows:  # the input of a layer
        rows.append(dataclasses.replace(failed_row, name=str(event)))
    if divergence.layer in ("model", "embedding"):
        divergence = dataclasses.replace(divergence, layer=OUTSIDE)
    tried = causes.of_foreign(torch_fn, event, counterparts, first.jax.values, first.torch.values)
    return Report(tuple(rows), dataclasses.replace(divergence, causes=tried))


def _value(event: Event) -> Callable[[Computed], np.ndarray]:
    return lambda computed: computed.values[event]


def _grad(i: int, computed: Computed) -> np.ndarray:
    return computed.grads[i]


def _weights(shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a result: the gradient of its plain sum would hide errors that cancel."""
    return np.random.default_rng(0).standard_normal(shape)


def _check_mode(module: "torch.nn.Module") -> None:
    """Refuses a module whose result does not depend on its inputs alone."""
    import torch

    kinds = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)
    for name, layer in module.named_modules():
        if isinstance(layer, kinds) and layer.training and getattr(layer, "p", True):
            raise UserError(f"torch_fn is in training mode with {layer} at {name!r}: call torch_fn.eval() first")


def _copied(module: "torch.nn.Module") -> "torch.nn.Module":
    try:
        return copy.deepcopy(module)
    except Exception as error:  # copying runs code of the module's author
        raise UserError(f"torch_fn cannot be copied ({error}): give a function instead of the module") from None


def _in_jax(function: Callable[..., Any], inputs: Sequence[np.ndarray]) -> Computed:
    arrays = [jnp.asarray(x) for x in inputs]
    floats_at = [i for i, x in enumerate(arrays) if is_float(x)]

    def of_floats(*floats: Any) -> Any:
        given = dict(zip(floats_at, floats, strict=True))
        result, trace = traced(function)(*(given.get(i, x) for i, x in enumerate(arrays)))
        _check_result(result, is_float(result), "jax_fn")
        return result, trace

    with jax.default_matmul_precision("highest"):
        result, pull, trace = jax.vjp(of_floats, *(arrays[i] for i in floats_at), has_aux=True)
        grads = pull(jnp.asarray(_weights(result.shape), result.dtype))
    by_input = {i: np.asarray(grad) for i, grad in zip(floats_at, grads, strict=True)}
    return Computed(trace.by_event(), frozenset(trace.owners), np.asarray(result), by_input)


def _in_torch(function: "Callable[..., Any] | torch.nn.Module", inputs: Sequence[Any]) -> Computed:
    import torch

    tensors = [to_tensor(np.asarray(x)) for x in inputs]
    tensors = [x.long() if x.dtype == torch.int32 else x for x in tensors]
    floats = {i: x.requires_grad_() for i, x in enumerate(tensors) if x.is_floating_point()}
    module = function if isinstance(function, torch.nn.Module) else torch.nn.Module()
    with hooked(module) as values:
        result = _main_tensor(function(*tensors))
    _check_result(result, torch.is_tensor(result) and result.is_floating_point(), "torch_fn")
    slopes: Sequence[Any] = [None] * len(floats)
    if result.requires_grad and floats:
        weights = to_tensor(_weights(tuple(result.shape))).to(result.dtype)
        slopes = torch.autograd.grad(result, list(floats.values()), weights, allow_unused=True)
    pairs = zip(floats.items(), slopes, strict=True)
    grads = {i: to_array(torch.zeros_like(x) if slope is None else slope) for (i, x), slope in pairs}
    owners = (name for name, layer in module.named_modules() if any(True for _ in layer.parameters(recurse=False)))
    return Computed(values, frozenset(owners), to_array(result), grads)


def _main_tensor(result: Any) -> Any:
    """The logits of an output of transformers, or the first entry of a tuple; anything else as it is."""
    import torch

    if torch.is_tensor(logits := getattr(result, "logits", None)):
        return logits
    return result[0] if isinstance(result, tuple) and result and torch.is_tensor(result[0]) else result


def _check_result(result: Any, is_array: bool, name: str) -> None:
    if not is_array:
        what = f"{type(result).__name__} {getattr(result, 'dtype', '')}".strip()
        raise UserError(f"{name} returns {what}, which cannot be compared: return one floating-point array")


def _paired(in_jax: Computed, in_torch: Computed, names: Mapping[str, str] | None) -> dict[Event, Event]:
    """The counterpart in torch of each event in JAX that has one, in JAX's order."""
    jax_layers, torch_layers = ({event.layer for event in side.values} - {""} for side in (in_jax, in_torch))
    if names is None:
        names = {layer: layer.replace("/", ".") for layer in jax_layers}
        if not set(names.values()) <= torch_layers:
            names = _by_order(in_jax, in_torch)
    for name, known in [(n, jax_layers) for n in names] + [(n, torch_layers) for n in names.values()]:
        if name and name not in known:
            raise UserError(
                f"names has {name!r}, a layer that was not called: those called are {', '.join(sorted(known))}"
            )
    pairs = {event: event._replace(layer=names[event.layer]) for event in in_jax.values if event.layer in names}
    return {event: other for event, other in pairs.items() if other in in_torch.values}


def _by_order(in_jax: Computed, in_torch: Computed) -> dict[str, str]:
    """Pairs the layers that have parameters of their own in the order of their results."""
    jax_layers, torch_layers = (
        list(dict.fromkeys(e.layer for e in side.values if e.side == "out" and e.layer in side.owners and e.layer))
        for side in (in_jax, in_torch)
    )
    if len(jax_layers) != len(torch_layers):
        raise UserError(
            f"{len(jax_layers)} layers in JAX ({', '.join(jax_layers)}) cannot be paired with {len(torch_layers)} in "
            f"torch ({', '.join(torch_layers)}): give names"
        )
    return dict(zip(jax_layers, torch_layers, strict=True))
