"""The pure training step, many steps in one compiled loop, and exact evaluation."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxlm.config import TrainConfig
from jaxlm.data.corpus import EvalBatch, batch_starts
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import cross_entropy, token_losses
from jaxlm.optim import skipped_steps
from jaxlm.types import Params

CHUNK_SECONDS = 1.0
"""About how long the compiled loop runs before Python looks at signals again."""

CHUNK_STEPS = 64
"""The most steps of one call of the compiled loop; bounds what a mapped corpus reads at once."""


class TrainState(NamedTuple):
    """All that a step replaces."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """What a step tells: its number (from 1), the loss of its batch before the update (nats a token), the gradient's
    global norm before clipping, how many steps of the run have been skipped so far, and whether it was one of them.
    """

    step: Int[Array, ""]
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    skipped: Int[Array, ""]
    is_skipped: Bool[Array, ""]

    @property
    def sound(self) -> Bool[Array, ""]:
        """Whether training may go on: loss and gradient are finite, or the step was skipped."""
        return jnp.isfinite(self.loss) & jnp.isfinite(self.grad_norm) | self.is_skipped


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def target_weights(windows: Int[Array, "B T1"], pad_token: int) -> Float[Array, "B T"]:
    """The weight of each target windows[:, 1:]: 0 on padding, elsewhere such that their mean is 1.

    Needs one target that is no padding.
    """
    real = (windows[:, 1:] != pad_token).astype(float)
    return real / real.mean()


def batch_loss(
    params: Params,
    model: LanguageModel,
    windows: Int[Array, "B T1"],
    dropout_key: Array | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Mean cross entropy, nats a token, of predicting windows[:, 1:] from what precedes each; dropout on if keyed.

    Weights multiply the losses and do not divide the mean, so micro-batches of one batch of `target_weights` average
    to the weighted mean over the batch, however its padding is spread over them.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits, _ = model.apply({"params": params}, windows[:, :-1], train=dropout_key is not None, rngs=rngs)
    if weights is None:
        return cross_entropy(logits, windows[:, 1:])
    losses = token_losses(logits, windows[:, 1:])
    return (losses * weights.astype(losses.dtype)).mean()


def train_step(
    state: TrainState,
    windows: Int[Array, "B T1"],
    model: LanguageModel,
    tx: optax.GradientTransformation,
    seed: Int[Array, ""] | int,
    grad_accum: int = 1,
    pad_token: int | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a batch of token windows, a pure function.

    With grad_accum > 1 the batch is cut into that many micro-batches and their gradients averaged. Dropout draws
    depend on (seed, step, micro-batch) alone. With a pad_token the loss is the mean over the batch's other targets.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 1)
    weights = None if pad_token is None else target_weights(windows, pad_token)

    def value_and_grad(windows: Int[Array, "micro T1"], weights: Float[Array, "micro T"] | None, key: Array):
        return jax.value_and_grad(batch_loss)(state.params, model, windows, key, weights)

    if grad_accum == 1:
        loss, grads = value_and_grad(windows, weights, key)
    else:

        def micro_step(total, micro):
            micro_windows, micro_weights, i = micro
            result = value_and_grad(micro_windows, micro_weights, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, result), None

        micro_batches = jax.tree.map(lambda a: a.reshape(grad_accum, -1, a.shape[1]), (windows, weights))
        shapes = jax.eval_shape(value_and_grad, *jax.tree.map(lambda a: a[0], micro_batches), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(micro_step, zeros, (*micro_batches, jnp.arange(grad_accum)))
        loss, grads = jax.tree.map(lambda leaf: leaf / grad_accum, total)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    skipped, before = skipped_steps(opt_state), skipped_steps(state.opt_state)
    metrics = StepMetrics(state.step + 1, loss, optax.tree.norm(grads), skipped, skipped > before)
    return TrainState(params, opt_state, metrics.step), metrics


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


Evaluate = Callable[[Params, Iterable[EvalBatch]], float]


def make_evaluate(model: LanguageModel) -> Evaluate:
    """Compiles `evaluate(params, batches) -> mean loss in nats a token` over every target that has weight."""

    @jax.jit
    def sums(
        params: Params,
        windows: Integer[Array | np.ndarray, "groups B T1"],
        weights: Float[Array | np.ndarray, "groups B T"],
    ):
        def batch(_, pair):
            tokens, weight = pair[0].astype(jnp.int32), pair[1]
            logits, _ = model.apply({"params": params}, tokens[:, :-1])
            return None, (token_losses(logits, tokens[:, 1:]) * weight).sum()

        return jax.lax.scan(batch, None, (windows, weights))[1]

    def evaluate(params: Params, batches: Iterable[EvalBatch]) -> float:
        total, count = 0.0, 0.0
        for b in batches:
            total += np.asarray(sums(params, b.windows, b.weights), np.float64).sum()
            count += b.weights.sum(dtype=np.float64)
        return float(total / count)

    return evaluate
