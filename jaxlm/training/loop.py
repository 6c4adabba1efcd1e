"""Many steps in one compiled loop, and the Python loop around it."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxlm.config import TrainConfig
from jaxlm.data.batches import BatchSource
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.partition import mesh_shape
from jaxlm.sharding import processes
from jaxlm.sharding.layout import put_array, shardings
from jaxlm.training.step import StepMetrics, TrainState, train_step

CHUNK_SECONDS = 1.0
"""About how long the compiled loop runs before Python looks at signals again."""


CHUNK_STEPS = 64
"""The most steps of one call of the compiled loop; bounds how much of a memory-mapped text is read at once."""

DISPATCH_SECONDS = 5e-4
"""Starting a chunk takes about this long. A call that lasts longer may have held Python until its steps were done."""


Chunk = Callable[[TrainState, BatchSource, Any], tuple[TrainState, StepMetrics]]


def make_chunk(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    cfg: TrainConfig,
    like: TrainState | None = None,
    document_end: int | None = None,
) -> Chunk:
    """Compiles `chunk(state, source, stop) -> (state, metrics of its last step)`; the state is donated.

    The loop runs from state.step to `stop`. It ends earlier after the first step that is not `sound`. The number of
    steps is an argument of the program, not a part of it: however a run is cut into chunks, the same program computes
    it, so a resumed run is bitwise the uninterrupted one. The batch of each step comes from `source`.

    Args:
      like: on a mesh, a state whose arrays lie where those of the result shall lie. Otherwise the compiler chooses, and
        the next call may compile once more.
      document_end: as in `training.step.batch_loss`.
    """
    places = (shardings(like), None) if like is not None and mesh_shape() else None

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    def chunk(state: TrainState, source: BatchSource, stop: Int[Array, ""]) -> tuple[TrainState, StepMetrics]:
        @jax.jit  # so that it is traced once, for its shapes and for the loop
        def step(state: TrainState) -> tuple[TrainState, StepMetrics]:
            windows = source.windows(cfg.seed, state.step, cfg.batch_size)
            weights = source.weights(windows)
            return train_step(state, windows, model, tx, cfg.seed, cfg.grad_accum, weights, document_end)

        # The loop carries the metrics of the last step, so it needs some of the same shapes to start with. Zeros are
        # sound.
        shapes = jax.eval_shape(step, state)[1]
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        goes_on, body = lambda carry: (carry[0].step < stop) & carry[1].sound, lambda carry: step(carry[0])
        return jax.lax.while_loop(goes_on, body, (state, start))

    return chunk


class Hook:
    """What `loop` calls beside the steps, in the order of the steps. A subclass overrides what it needs."""

    def should_stop(self) -> bool:
        """Asked before each chunk: whether training ends here, in all processes."""
        return False

    def on_chunk(self, metrics: StepMetrics, steps: int, seconds: float) -> None:
        """A chunk of `steps` steps is done and took `seconds`; `metrics` are those of its last step, on the host."""

    def on_boundary(self, state: TrainState, step: int) -> None:
        """The state is that of a step after which the run is evaluated or saved."""

    def on_end(self, state: TrainState) -> None:
        """No step follows: the run is complete, or a hook has stopped it."""


def block_steps(cfg: TrainConfig) -> int:
    """The most steps between two calls for a `BatchSource`."""
    return min(cfg.log_every, CHUNK_STEPS)


def next_boundary(step: int, cfg: TrainConfig) -> int:
    """The next step after `step` that is logged, evaluated or saved; step 1 is one, to time compilation apart."""
    periods = cfg.log_every, cfg.eval_every, cfg.checkpoint_every
    return min(1 if step == 0 else cfg.steps, cfg.steps, *((step // period + 1) * period for period in periods))


def loop(
    chunk: Chunk,
    state: TrainState,
    source: Callable[[int], BatchSource],
    cfg: TrainConfig,
    hooks: Sequence[Hook],
) -> TrainState:
    """Trains from state.step to cfg.steps, or until a hook stops it.

    A chunk's metrics are read when the next chunk is already under way, so the device does not wait for Python. Hooks
    get them as NumPy arrays: what a hook computed on the device would wait for the chunk under way. Python waits for
    the device once a chunk, and at boundaries, where hooks evaluate and save. Where the call itself lasts as long as
    its steps (on a GPU the host runs the loop), its metrics are read at once: they are there. Chunks end at boundaries
    and last about CHUNK_SECONDS, so that a signal is answered soon.

    Args:
      source: what `chunk` reads for the CHUNK_STEPS steps from a step on.
    """
    step, chunk_limit, pending = int(jax.device_get(state.step)), 1, None
    started = time.perf_counter()

    def report_pending(ended: float | None = None) -> None:
        """Waits for the chunk that was started last, and tells the hooks; `ended` is when it was done, if known."""
        nonlocal pending, chunk_limit, started
        if pending is not None:
            on_device, steps = pending
            metrics = jax.device_get(on_device)
            ended = time.perf_counter() if ended is None else ended
            seconds = ended - started
            chunk_limit = min(max(1, int(CHUNK_SECONDS * steps / seconds)), CHUNK_STEPS)
            pending, started = None, ended
            for hook in hooks:
                hook.on_chunk(metrics, steps, seconds)

    while step < cfg.steps:
        # Clocks and signals differ between processes, so process 0 says where a chunk ends, and all stop if one must.
        stop = min(next_boundary(step, cfg), step + chunk_limit)
        agreed = processes.agree(stop, any(hook.should_stop() for hook in hooks))
        if agreed[:, 1].any():
            break
        stop = int(agreed[0, 0])
        block, end, called = source(step), put_array(np.asarray(stop, np.int32)), time.perf_counter()
        state, metrics = chunk(state, block, end)
        returned = time.perf_counter()
        held = _is_done(metrics, returned - called)
        if held and pending is None:
            started = called  # hooks since the chunk before are not training time
        share = pending[1] / (pending[1] + stop - step) if pending else 0.0
        report_pending(started + share * (returned - started) if held else None)
        pending, step = (metrics, stop - step), stop
        if held:
            report_pending(returned)
        if step == cfg.steps or step % cfg.eval_every == 0 or step % cfg.checkpoint_every == 0:
            report_pending()
            for hook in hooks:
                hook.on_boundary(state, step)
            started = time.perf_counter()  # evaluating and saving are not training time
    report_pending()
    for hook in hooks:
        hook.on_end(state)
    return state


def _is_done(metrics: StepMetrics, seconds: float) -> bool:
    """Whether the steps of a chunk are done when its call returns after so many seconds."""
    if seconds > DISPATCH_SECONDS:
        time.sleep(DISPATCH_SECONDS)  # the last results of a GPU may be on their way
    return cast(Any, metrics.loss).is_ready()
