"""One training step, a pure function."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import cross_entropy, token_losses
from jaxlm.ops.masks import document_numbers
from jaxlm.ops.partition import constrain, mesh_shape
from jaxlm.optim import skipped_steps
from jaxlm.sharding.layout import optimizer_shardings
from jaxlm.types import Params


class TrainState(NamedTuple):
    """All that a training step changes."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """The measurements of a training step: arrays of the device, or of NumPy once `loop` has read them."""

    step: Int[Array, ""]
    """Its number, from 1."""
    loss: Float[Array, ""]
    """The loss of its batch before the update, nats a token."""
    grad_norm: Float[Array, ""]
    """The gradient's global norm before clipping."""
    skipped: Int[Array, ""]
    """How many steps of the run have been skipped so far."""
    is_skipped: Bool[Array, ""]
    """Whether this step was skipped."""

    @property
    def sound(self) -> Bool[Array, ""] | np.bool_:
        """Whether training can continue: loss and gradient are finite, or the step was skipped.

        Of measurements on the host (NumPy) it is computed there, without the device.
        """
        return (abs(self.loss) < math.inf) & (abs(self.grad_norm) < math.inf) | self.is_skipped


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, made by one program: one for each array would take longer to compile.

    With a mesh in context the optimizer's state is split over it as the parameters are.
    """
    places = None
    if mesh_shape():
        whole = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        places = optimizer_shardings(tx, params), whole

    # Some optimizers keep the first parameters, or one array twice. The loop gives all arrays of a state away (donates
    # them), which can be done once for each.
    def initial(params: Params) -> tuple[optax.OptState, Array]:
        return jax.tree.map(jnp.copy, tx.init(params)), jnp.zeros((), jnp.int32)

    make = jax.jit(initial, out_shardings=places)
    return TrainState(params, *make(params))


def packing(tokens: Int[Array, "B T"], document_end: int | None) -> dict[str, Any]:
    """The further argument of a model that keeps attention inside a document; none if there is no `document_end`."""
    return {} if document_end is None else {"documents": document_numbers(tokens, document_end)}


def batch_loss(
    params: Params,
    model: LanguageModel,
    windows: Int[Array, "B T1"],
    dropout_key: Array | None = None,
    weights: Float[Array, "B T"] | None = None,
    document_end: int | None = None,
) -> Float[Array, ""]:
    """Mean cross entropy, nats a token, of predicting each of windows[:, 1:] from the tokens before it.

    Args:
      dropout_key: turns dropout on; None = off.
      weights: multiply the losses and do not divide the mean. So the losses of micro-batches average to the weighted
        mean over the whole batch, however its padding is spread over them, if the mean weight of the batch is 1.
      document_end: the token that ends a document, which attention does not look past; None = it sees the window.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    packed = packing(windows[:, :-1], document_end)
    logits, _ = model.apply({"params": params}, windows[:, :-1], train=dropout_key is not None, rngs=rngs, **packed)
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
    weights: Float[Array, "B T"] | None = None,
    document_end: int | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a batch of token windows, a pure function.

    With grad_accum > 1 the batch is cut into that many micro-batches, and their gradients are averaged. Dropout
    depends on (seed, step, micro-batch) alone.

    Args:
      weights: of each target, with a mean of 1 over the batch (`jaxlm.data.batches.target_weights`); None = all count
        alike.
      document_end: as in `batch_loss`.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), 1)

    def value_and_grad(windows: Int[Array, "micro T1"], weights: Float[Array, "micro T"] | None, key: Array):
        return jax.value_and_grad(batch_loss)(state.params, model, windows, key, weights, document_end)

    windows = constrain(windows, "batch", None)
    if grad_accum == 1:
        loss, grads = value_and_grad(windows, weights, key)
    else:

        def micro_step(total, micro):
            micro_windows, micro_weights, i = micro
            micro_windows = constrain(micro_windows, "batch", None)
            result = value_and_grad(micro_windows, micro_weights, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, result), None

        micro_batches = jax.tree.map(lambda a: a.reshape(grad_accum, -1, a.shape[1]), (windows, weights))
        shapes = jax.eval_shape(value_and_grad, *jax.tree.map(lambda a: a[0], micro_batches), key)
        # A sum in bfloat16 would lose the later micro-batches, so totals are in at least float32.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)
        total, _ = jax.lax.scan(micro_step, zeros, (*micro_batches, jnp.arange(grad_accum)))
        loss, grads = jax.tree.map(lambda leaf, like: (leaf / grad_accum).astype(like.dtype), total, shapes)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    skipped, before = skipped_steps(opt_state), skipped_steps(state.opt_state)
    metrics = StepMetrics(state.step + 1, loss, optax.tree.norm(grads), skipped, skipped > before)
    return TrainState(params, opt_state, metrics.step), metrics
