"""Where a run has left the finite numbers: its last steps are taken again, the bad one layer by layer."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from jaxlm.data.batches import BatchSource
from jaxlm.errors import CheckError, UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layer_stack import unstack_params
from jaxlm.parity.capture import Trace, traced
from jaxlm.run import checkpoint
from jaxlm.run.session import Session
from jaxlm.sharding import processes
from jaxlm.sharding.layout import put_array
from jaxlm.training.loop import Chunk
from jaxlm.training.step import TrainState, batch_loss, init_state
from jaxlm.types import Params

SQUARES_OVERFLOW = 1e17
"""A gradient with larger numbers may have a norm beyond float32."""

SECONDS = 300.0
"""For so long steps are taken again, at most."""


class DivergedError(CheckError):
    """A step whose loss, gradient or update is not finite."""

    def __init__(self, step: int, what: str, advice: str) -> None:
        """Args: step: the first step that is known to be bad; what: what was seen; advice: what the user can do."""
        super().__init__(f"{what}; {advice}")
        self.step, self.what, self.advice = step, what, advice

    def at(self, place: "Place", out: Path) -> "DivergedError":
        """The same error of the run `out`, which also says where."""
        advice = self.advice if place.checkpoint is None else _advice_without(out, place.checkpoint)
        return DivergedError(self.step, f"{self.what}; {place.what}", advice)


class Place(NamedTuple):
    """Where a run has left the finite numbers."""

    what: str
    checkpoint: int | None = None
    """The step of the checkpoint whose next step is bad with any learning rate; None = there is none that is known."""


def _advice_without(out: Path, step: int) -> str:
    """What to do where the latest checkpoint leads to numbers that are not finite, whatever the learning rate."""
    earlier = [one for one in checkpoint.steps(out / "checkpoints") if one < step]
    if not earlier:
        return f"no rate helps from step {step} on: start a new --out with a lower --optim.learning-rate"
    return (
        f"no rate helps from step {step} on: move {out / 'checkpoints' / str(step)} away, and go on from step "
        f"{earlier[-1]} with --resume and a lower --optim.learning-rate"
    )


@jax.jit
def _finite(tree: Any) -> Any:
    """Whether all numbers of each leaf are finite."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def all_finite(params: Params) -> bool:
    """Whether all numbers are finite."""
    return all(jax.tree.leaves(jax.device_get(_finite(params))))


def find(
    session: Session,
    chunk: Chunk,
    source: Callable[[int], BatchSource],
    document_end: int | None,
    step: int,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Place:
    """Says which step and which layer or parameter are the first that are not finite.

    From the latest checkpoint, or else from the beginning, the same program takes the steps again, one at a time; so
    they are bitwise the same. After each the parameters are checked. Of the bad step, the output of every layer, the
    loss and the gradient of every parameter are checked.

    Args:
      chunk, source: as in `training.loop.loop`.
      document_end: as in `training.step.batch_loss`.
      step: a step whose loss or gradient is not finite, or the one after an update that is not.
      say: shows a line.
      should_stop: asked before each step; ends the search.
    """
    if processes.count() > 1:
        return Place("where it began is not looked for by several processes")
    try:
        return _search(session, chunk, source, document_end, step, say, should_stop)
    except (jax.errors.JaxRuntimeError, CheckError, UserError) as error:  # too little memory, damaged checkpoints
        return Place(f"where it began could not be looked for ({str(error).splitlines()[0]})")


def _search(
    session: Session,
    chunk: Chunk,
    source: Callable[[int], BatchSource],
    document_end: int | None,
    step: int,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Place:
    restored = checkpoint.restore_latest(session.out / "checkpoints", session.state)
    state = _initial(session) if restored is None else restored[0]
    at, end = int(state.step), time.perf_counter() + SECONDS
    saved = None if restored is None else at
    say(f"step {step} is not finite: looking for where that begins, from step {at} on")
    while at < step - 1:
        if should_stop() or time.perf_counter() > end:
            return Place(f"where it begins was looked for up to step {at}, and not found")
        state, _ = chunk(state, source(at), put_array(np.asarray(at + 1, np.int32)))
        at += 1
        if bad := _bad_parameters(session, state.params):
            return Place(f"the first that is not finite is the update of {_named(bad)} in step {at}")
    found = _bad_parameters(session, state.params)
    if found:
        return Place(f"the checkpoint of step {at} already has numbers that are not finite, in {_named(found)}", saved)
    what = f"the first that is not finite is {_within(session, state, source(at), document_end)} in step {step}"
    return Place(what, saved if saved == at else None)


def _initial(session: Session) -> TrainState:
    """The state with which the run began."""
    return init_state(init_params(session.model, jax.random.key(session.config.train.seed)), session.tx)


def _bad_parameters(session: Session, tree: Params) -> list[str]:
    """The parameters that are not finite, in the order of their names; layers that are stacked have one name each."""
    if all_finite(tree):
        return []
    cfg = session.config.model
    finite = jax.device_get(_finite(unstack_params(cfg, tree) if cfg.scan_layers else tree))
    return [name for name, is_finite in flatten_dict(finite, sep="/").items() if not is_finite]


def _owns(layer: str, name: str) -> bool:
    """Whether a parameter of this name lies in a layer."""
    return not layer or name.startswith(f"{layer}/")


def _named(names: list[str]) -> str:
    others = len(names) - 1
    return names[0] + (f" (and {others} other{'s' * (others > 1)})" if others else "")


def _within(session: Session, state: TrainState, source: BatchSource, document_end: int | None) -> str:
    """What of the next step is the first that is not finite."""
    cfg, model = session.config.train, session.model
    windows = source.windows(cfg.seed, state.step, cfg.batch_size)
    weights = source.weights(windows)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), state.step), 1)
    micro_batches = jax.tree.map(lambda a: a.reshape(cfg.grad_accum, -1, a.shape[1]), (windows, weights))
    for i in range(cfg.grad_accum):
        micro, weight = jax.tree.map(lambda a, i=i: a[i], micro_batches)
        micro_key = jax.random.fold_in(key, i) if cfg.grad_accum > 1 else key
        arguments = micro, micro_key, weight, document_end
        found, layers = _in_forward_pass(session, state.params, *arguments)
        if found is not None:
            return found
        grads = jax.jit(
            lambda params, micro, key, weight: jax.grad(batch_loss)(params, model, micro, key, weight, document_end)
        )(state.params, micro, micro_key, weight)
        if bad := _bad_parameters(session, grads):
            # The backward pass goes from the last layer to the first; "" is the model, which owns embeddings.
            places = {name: max(i for i, layer in enumerate(layers) if _owns(layer, name)) for name in bad}
            return f"the gradient of {_named(sorted(bad, key=lambda name: -places[name]))}"
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
        if largest > SQUARES_OVERFLOW:
            return f"the norm of the gradient, whose numbers reach {largest:.2g}"
    return "no layer and no gradient, where each is computed on its own (rounding decides)"


def _in_forward_pass(
    session: Session,
    params: Params,
    windows: Int[Array, "B T1"],
    key: Array,
    weights: Float[Array, "B T"] | None,
    document_end: int | None,
) -> tuple[str | None, list[str]]:
    """The first layer whose output is not finite, or the loss, or None; and the paths of all layers as they begin."""
    cfg = session.config.model
    if cfg.scan_layers:
        params = unstack_params(cfg, params)
    model = build_model(dataclasses.replace(cfg, scan_layers=False, remat=False))  # nothing is captured inside of these

    def measured(params: Params) -> tuple[Array, Trace]:
        loss, trace = traced(batch_loss)(params, model, windows, key, weights, document_end)
        return loss, jax.tree.map(lambda value: jnp.abs(value).max(), trace)

    loss, trace = jax.device_get(jax.jit(measured)(params))
    values, before = trace.by_event(), 0.0
    layers = ["", *(event.layer for event in values if event.side == "in")]
    for event, largest in values.items():
        if not np.isfinite(largest):
            return f"{event} (before it, numbers up to {before:.2g})", layers
        before = float(largest)
    return None if np.isfinite(loss) else "the loss, of finite logits", layers
