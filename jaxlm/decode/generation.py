"""New tokens: in blocks as they come, and all together."""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class TokenBlock(NamedTuple):
    """The next few new tokens of every row, and their log-probabilities under the model itself."""

    tokens: Int[np.ndarray, "R steps"]
    log_probs: Float[np.ndarray, "R steps"]


class Generation(NamedTuple):
    """The result of `generate`: R = B * num_samples rows, the samples of a prompt one after another.

    tokens: [R, n] int32; slots after a stop token hold it again.
    log_probs: [R, n] log-probability in nats of each token under the model itself (before temperature and
      filters); 0 after the stop token.
    lengths: [R] tokens before the stop token.
    """

    tokens: Int[Array, "R n"]
    log_probs: Float[Array, "R n"]
    lengths: Int[Array, " R"]


def join_blocks(blocks: Iterable[TokenBlock], max_new_tokens: int, stops: Bool[Array | np.ndarray, " V"]) -> Generation:
    """All blocks together. Where they end early every row has stopped, and its stop token fills the rest."""
    parts = list(blocks)
    tokens = np.concatenate([part.tokens for part in parts], axis=1)
    log_probs = np.concatenate([part.log_probs for part in parts], axis=1)
    missing = ((0, 0), (0, max_new_tokens - tokens.shape[1]))
    tokens, log_probs = np.pad(tokens, missing, mode="edge"), np.pad(log_probs, missing)
    lengths = np.cumprod(~np.asarray(stops)[tokens], axis=1, dtype=np.int32).sum(axis=1, dtype=np.int32)
    return Generation(jnp.asarray(tokens), jnp.asarray(log_probs), jnp.asarray(lengths))
