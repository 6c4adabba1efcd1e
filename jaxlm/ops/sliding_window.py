"""Sliding-window attention in time and memory O(T W)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxlm.ops.attention import attend
from jaxlm.ops.attention_scores import Score, dot_scores
from jaxlm.ops.masks import attention_mask

CHUNK = 2048
"""Queries computed at once when there is no dropout. The backward pass recomputes the weights of a chunk: at 16,384
tokens this took 0.7 of the time and 0.4 of the memory (docs/log.md)."""


def local_attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K Hv"],
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    window: int,
    *,
    block: int | None = None,
    chunk: int | None = None,
    score: Score = dot_scores,
    cap: float | None = None,
    on_weights: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T maps Hv"]:
    """`attention.attend` under a sliding window, in time and memory O(T W) instead of O(T S).

    The queries are cut into blocks. A block reads its own keys and as many before them as the window reaches back; the
    usual mask of positions decides inside. The last T keys must be those of the queries' own tokens, and any keys
    before them (from a cache) must lead up to them without a gap, oldest first. Padding (position -1) may come before
    or after all of them.

    Args:
      window: keys a query sees, itself included.
      block: queries in a block; None = about half the window, which is fastest for windows of 32 to 256 (docs/log.md).
      chunk: queries computed at once; None = CHUNK, or all if `on_weights` is given, which may draw random numbers.
    """
    length, window = queries.shape[1], min(window, keys.shape[1])
    query_positions, key_positions = (
        jnp.broadcast_to(x, (len(queries), x.shape[1])) for x in (query_positions, key_positions)
    )
    block = block or min(length, max(16, -(-window // 2)))
    chunk = chunk or (max(CHUNK, window) if on_weights is None else length)

    def blocked(queries: Array, keys: Array, values: Array, query_positions: Array, key_positions: Array) -> Array:
        def cut(x: Array, size: int, seen: int, fill: int = 0) -> Array:
            pieces = _cut(x, size, seen, queries.shape[1], fill)
            return pieces.reshape(-1, *pieces.shape[2:])  # blocks are a larger batch

        reach = block + window - 1
        mask = attention_mask(cut(query_positions, block, block, -1), cut(key_positions, block, reach, -1), window)
        at = cut(queries, block, block), cut(keys, block, reach), cut(values, block, reach), mask
        out = attend(*at, score=score, cap=cap, on_weights=on_weights)
        return out.reshape(len(queries), -1, *out.shape[2:])[:, : queries.shape[1]]

    if length <= chunk:
        return blocked(queries, keys, values, query_positions, key_positions)
    reach = chunk + window - 1
    chunks = (
        _cut(queries, chunk, chunk, length),
        _cut(keys, chunk, reach, length),
        _cut(values, chunk, reach, length),
        _cut(query_positions, chunk, chunk, length, -1),
        _cut(key_positions, chunk, reach, length, -1),
    )
    by_chunk = jax.lax.map(jax.checkpoint(lambda at: blocked(*at)), [jnp.moveaxis(x, 1, 0) for x in chunks])
    out = jnp.moveaxis(by_chunk, 0, 1)
    return out.reshape(len(queries), -1, *out.shape[3:])[:, :length]


def _cut(x: Shaped[Array, "B S *rest"], size: int, seen: int, length: int, fill: int = 0) -> Array:
    """[B, pieces, seen, ...]: the last `length` entries in pieces of `size`, after seen - size earlier entries each.

    `fill` stands for entries missing at the start and at the end. The result is built from shifted copies, as few as
    are needed, so that its derivative is a sum of few terms.
    """
    pieces, shifts = -(-length // size), -(-(seen - size) // size)
    missing = shifts * size - (x.shape[1] - length)
    widths = [(0, 0), (max(missing, 0), pieces * size - length), *[(0, 0)] * (x.ndim - 2)]
    whole = jnp.pad(x[:, max(-missing, 0) :], widths, constant_values=fill).reshape(len(x), -1, size, *x.shape[2:])
    shifted = [whole[:, i : i + pieces] for i in range(shifts + 1)]
    if shifts:  # only the end of the first one is needed
        shifted[0] = shifted[0][:, :, shifts * size + size - seen :]
    return jnp.concatenate(shifted, axis=2)
