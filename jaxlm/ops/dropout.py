"""Which entries dropout keeps."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, PRNGKeyArray

KEPT = "kept by dropout"
"""The name under which `jax.checkpoint` may find what was drawn, to save it: drawing costs more than storing."""


def draw_kept(key: PRNGKeyArray, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """True with probability 1 - rate, to within 2^-17, independently for each entry.

    An entry takes 16 random bits, not the 32 of `jax.random.bernoulli`: on CPU the bits take almost all the time.
    """
    count = math.prod(shape)
    words = jax.random.bits(key, (math.ceil(count / 2),), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16])[:count]
    kept = halves < round((1 - rate) * 2**16)
    return checkpoint_name(kept.reshape(shape), KEPT)
