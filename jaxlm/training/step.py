"""The pure training step, many steps in one compiled loop, and exact evaluation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import cross_entropy, token_losses
from jaxlm.optim import skipped_steps
from jaxlm.types import Params


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
