"""Many steps in one compiled loop, and the Python loop around it."""

import functools
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxlm.config import TrainConfig
from jaxlm.data.batches import batch_starts
from jaxlm.model.layers import LanguageModel
from jaxlm.training.step import StepMetrics, TrainState, train_step

CHUNK_SECONDS = 1.0
"""About how long the compiled loop runs before Python looks at signals again."""


CHUNK_STEPS = 64
"""The most steps of one call of the compiled loop; bounds what a mapped corpus reads at once."""


Chunk = Callable[[TrainState, Array, int], tuple[TrainState, StepMetrics]]


def make_chunk(
    model: LanguageModel, tx: optax.GradientTransformation, cfg: TrainConfig, pad_token: int | None = None
) -> Chunk:
    """Compiles `chunk(state, source, stop) -> (state, metrics of its last step)`, the state donated.

    The loop runs from state.step to `stop`, or ends after the first step whose loss or gradient is no finite number
    and that the optimizer did not skip. Its trip count is no part of the program: however a run is cut into chunks,
    one program computes it, so a resumed run is bitwise the uninterrupted one. `source` is the tokens of the training
    split [n], from which each step cuts its windows; or its rows [R, T + 1], of which each step takes B, over the run
    each about as often; or the windows of the coming steps [steps, B, T + 1].

    Args:
      pad_token: the target that has no weight, as in `train_step`; None = all count.
    """
    seq_len = model.cfg.max_seq_len

    @functools.partial(jax.jit, donate_argnums=0)
    def chunk(state: TrainState, source: Array, stop: Int[Array, ""]) -> tuple[TrainState, StepMetrics]:
        first = state.step

        def windows(step: Int[Array, ""]) -> Int[Array, "B T1"]:
            if source.ndim == 3:
                return source[step - first].astype(jnp.int32)
            if source.ndim == 2:
                return source[batch_starts(cfg.seed, step, cfg.batch_size, source.shape[0])].astype(jnp.int32)
            starts = batch_starts(cfg.seed, step, cfg.batch_size, source.shape[0] - seq_len)
            return source[starts[:, None] + jnp.arange(seq_len + 1)[None]].astype(jnp.int32)

        def body(carry):
            state, _ = carry
            return train_step(state, windows(state.step), model, tx, cfg.seed, cfg.grad_accum, pad_token)

        shapes = jax.eval_shape(body, (state, None))[1]
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.while_loop(lambda carry: (carry[0].step < stop) & carry[1].sound, body, (state, start))

    return chunk


@runtime_checkable
class Hooks(Protocol):
    """What `loop` calls, in the order of the steps."""

    def stop(self) -> bool:
        """Asked before each chunk: whether to end here."""

    def report(self, metrics: StepMetrics, steps: int, seconds: float) -> None:
        """A chunk of so many steps is done, and took so long."""

    def boundary(self, state: TrainState, step: int) -> None:
        """The state is at a step that is evaluated or saved."""


def next_boundary(step: int, cfg: TrainConfig) -> int:
    """The next step after `step` that is logged, evaluated or saved. Step 1 is, so that compiling is timed apart."""
    periods = cfg.log_every, cfg.eval_every, cfg.checkpoint_every
    return min(1 if step == 0 else cfg.steps, cfg.steps, *((step // period + 1) * period for period in periods))


def loop(
    chunk: Chunk, state: TrainState, source: Callable[[int, int], Array], cfg: TrainConfig, hooks: Hooks
) -> TrainState:
    """Trains from state.step to cfg.steps, or until hooks.stop().

    A chunk's metrics are read after the next chunk is under way. Chunks end at boundaries and last about
    CHUNK_SECONDS, so that a signal is answered soon.

    Args:
      source: what `chunk` reads for the steps from its first argument up to its second.
    """
    step, chunk_limit, pending = int(state.step), 1, None
    started = time.perf_counter()

    def settle() -> None:
        nonlocal pending, chunk_limit, started
        if pending is not None:
            metrics, steps = pending
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - started
            chunk_limit = min(max(1, int(CHUNK_SECONDS * steps / seconds)), CHUNK_STEPS)
            pending, started = None, time.perf_counter()
            hooks.report(metrics, steps, seconds)

    while step < cfg.steps and not hooks.stop():
        stop = min(next_boundary(step, cfg), step + chunk_limit)
        state, metrics = chunk(state, source(step, stop), stop)
        settle()
        pending, step = (metrics, stop - step), stop
        if step == cfg.steps or step % cfg.eval_every == 0 or step % cfg.checkpoint_every == 0:
            settle()
            hooks.boundary(state, step)
            started = time.perf_counter()
    settle()
    return state
