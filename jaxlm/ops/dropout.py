"""Which entries dropout keeps."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int, PRNGKeyArray

KEPT = "kept by dropout"
"""The name under which `jax.checkpoint` may find what was drawn, to save it: drawing costs more than storing."""


def draw_kept(
    key: PRNGKeyArray, rate: float, shape: tuple[int, ...], lines: Int[Array, "*lines"] | None = None
) -> Bool[Array, "..."]:
    """True with probability 1 - rate, to within 2^-17, independently for each entry.

    An entry takes 16 random bits, not the 32 of `jax.random.bernoulli`: on CPU the bits take almost all the time. Two
    entries of the last axis share a word, so an array that is split along other axes is drawn where it lies.

    Args:
      lines: a number for each line of the last axis, from which the line is drawn, wherever it lies in the array. None
        = a line is drawn from its place.
    """
    width = math.ceil(shape[-1] / 2)
    if lines is None:
        words = jax.random.bits(key, (*shape[:-1], width), jnp.uint32)
    else:

        def line(number: Int[Array, ""]) -> Array:
            return jax.random.bits(jax.random.fold_in(key, number), (width,), jnp.uint32)

        words = jax.vmap(line)(lines.reshape(-1)).reshape(*shape[:-1], width)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., : shape[-1]]
    return checkpoint_name(halves < round((1 - rate) * 2**16), KEPT)
