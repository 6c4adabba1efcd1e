"""The log-probability of given tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlm.decode.checks import check_finite, check_ids
from jaxlm.errors import UserError
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import target_log_probs
from jaxlm.sharding.mesh import find_devices
from jaxlm.types import Params, Tokens


def score(
    model: LanguageModel, params: Params, tokens: Tokens, weights: Float[Array | np.ndarray, "B T1"] | None = None
) -> Float[Array, " B"]:
    """The log-probability in nats of tokens[:, 1:], each given those before it; one full forward pass.

    It may stand inside jax.jit and jax.vmap of a function of the parameters. There logits that are not finite are not
    refused: they make the result NaN.

    Args:
      tokens: [B, T] ids, T >= 2.
      weights: [B, T - 1] factor of each target's log-probability, 0 for padding (on the right).

    Raises:
      UserError: no targets, ids outside the vocabulary, weights of another shape or that are not finite, too many for
        a learned table.
      CheckError: logits that are not finite, with the row and the first token.
    """
    find_devices()
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(f"tokens has shape {ids.shape}: give [B, T] with B at least 1 and T at least 2")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"tokens has type {ids.dtype}: give integer token ids")
    check_ids("tokens", ids, model.cfg.vocab_size)
    targets = (len(ids), ids.shape[1] - 1)
    weights = np.ones(targets, np.float32) if weights is None else np.asarray(weights)
    if weights.shape != targets:
        raise UserError(f"weights has shape {weights.shape}: give one for each target, {targets}")
    if not np.isfinite(weights).all():
        raise UserError(f"weights holds {weights[~np.isfinite(weights)][0]}: give finite numbers, 0 for padding")
    total, are_finite = _score(model, params, ids, weights)
    check_finite(are_finite, params, 1, "token")
    return total


@functools.partial(jax.jit, static_argnames="model")
def _score(
    model: LanguageModel, params: Params, tokens: Tokens, weights: Float[Array, "B T1"]
) -> tuple[Float[Array, " B"], Bool[Array, "B T1"]]:
    logits = model.apply({"params": params}, tokens[:, :-1])[0]
    log_probs = target_log_probs(logits, tokens[:, 1:], or_nan=True)
    return (log_probs * weights).sum(axis=1), jnp.isfinite(log_probs)
