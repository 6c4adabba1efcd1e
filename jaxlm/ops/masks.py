"""Attention masks: the one place that decides which keys a query may see."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def attention_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
    first: Int[Array, "rows T"] | None = None,
) -> Bool[Array, "_ T S"]:
    """True where a query may see a key, given the absolute positions of both.

    A key is visible if its slot is filled (position >= 0), it is not in the future and, with a window W, it is among
    the W latest positions, the query's own included. Nothing sees a slot with position -1 (empty or padding), and a
    query with position -1 sees nothing.

    Args:
      first: the first position that each query may see (`document_starts`); None = 0. It may have B rows where the
        positions have one.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    if window is not None:
        mask &= query - key < window
    if first is not None:
        mask &= key >= first[:, :, None]
    return mask


def document_numbers(tokens: Int[Array, "B T"], end_of_text: int) -> Int[Array, "B T"]:
    """The document of each token in its row, from 0: how many end-of-text tokens stand before it."""
    ends = (tokens == end_of_text).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def document_starts(documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The place in its row where the document of each token begins, that is, where the number has last changed."""
    changes = documents[:, 1:] != documents[:, :-1]
    places = jnp.arange(1, documents.shape[1], dtype=jnp.int32)
    return jnp.pad(jax.lax.cummax(jnp.where(changes, places, 0), axis=1), ((0, 0), (1, 0)))
