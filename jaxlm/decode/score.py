"""The log-probability of given tokens."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlm.decode.checks import check_ids
from jaxlm.errors import UserError
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import target_log_probs
from jaxlm.types import Params, Tokens


def score(
    model: LanguageModel, params: Params, tokens: Tokens, weights: Float[Array | np.ndarray, "B T1"] | None = None
) -> Float[Array, " B"]:
    """The log-probability in nats of tokens[:, 1:], each given those before it; one full forward pass.

    Args:
      tokens: [B, T] ids, T >= 2.
      weights: [B, T - 1] factor of each target's log-probability, 0 for padding (on the right).

    Raises:
      UserError: no targets, ids outside the vocabulary, weights of another shape, too many for a learned table.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(f"tokens has shape {ids.shape}: give [B, T] with B at least 1 and T at least 2")
    check_ids("tokens", ids, model.cfg.vocab_size)
    targets = (len(ids), ids.shape[1] - 1)
    weights = np.ones(targets, np.float32) if weights is None else np.asarray(weights)
    if weights.shape != targets:
        raise UserError(f"weights has shape {weights.shape}: give one for each target, {targets}")
    return _score(model, params, ids, weights)


@functools.partial(jax.jit, static_argnames="model")
def _score(model: LanguageModel, params: Params, tokens: Tokens, weights: Float[Array, "B T1"]) -> Float[Array, " B"]:
    logits = model.apply({"params": params}, tokens[:, :-1])[0]
    return (target_log_probs(logits, tokens[:, 1:]) * weights).sum(axis=1)
