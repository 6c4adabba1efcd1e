"""Causal attention in blocks of queries, each of which reads only the keys that it may see.

Without a window, time falls to somewhat more than half, and memory grows with the length, not with its square. With a
window W both are O(T W).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxlm.ops.attention import WeightDropout, attend
from jaxlm.ops.attention_scores import Score, dot_scores
from jaxlm.ops.dropout import KEPT
from jaxlm.ops.masks import attention_mask

BLOCK, MAX_BLOCKS = 64, 4
"""Without a window, queries are cut into at most MAX_BLOCKS blocks of at least BLOCK."""

BATCHED_FROM_WINDOWS, BATCHED_FROM_TOKENS = 3, 128
"""Queries, in windows and in tokens, from which equal blocks form a larger batch; below, MAX_BLOCKS are as fast."""

TILE, FORWARD_TILE, ACCELERATOR_TILE = 400_000, 1_000_000, 100_000_000
"""Scores computed at once on CPU in a training step, whose backward pass recomputes one tile after the other; on CPU
without a backward pass, and of one row in any case; on a GPU or TPU.

Tiles of 1.6 and 4 MB stay in the processor's cache: the first took 0.75 of the time of keeping all weights
(docs/log.md).
"""

MIN_CHUNK = 64
"""Queries of one row that are computed at once, at least."""


def blocked_attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K Hv"],
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    window: int | None = None,
    *,
    first: Int[Array, "#B T"] | None = None,
    batched: bool | None = None,
    block: int | None = None,
    tile: int | None = None,
    train: bool = True,
    score: Score = dot_scores,
    cap: float | None = None,
    dropout: WeightDropout | None = None,
) -> Float[Array, "B T maps Hv"]:
    """`attention.attend` under the causal mask of positions, without the work and the memory above the diagonal.

    The queries are cut into blocks. A block reads its own keys and those before them, as far back as the window
    reaches; the usual mask of positions decides inside. The last T keys must be those of the queries' own tokens, and
    any keys before them (from a cache) must lead up to them without a gap, oldest first. Padding (position -1) may come
    before or after all of them.

    Args:
      window: keys a query sees, itself included; None = all.
      first: the first position that each query may see, as in `attention_mask`.
      batched: whether the blocks, which then read equally many keys, form a larger batch; None = if there are many.
      block: queries in a block. None = a quarter of the queries, but at least BLOCK; if batched, about half the window,
        which is fastest for windows of 32 to 256 (docs/log.md).
      tile: scores computed at once, about. None = as the device likes it (TILE). The backward pass recomputes the
        weights of one tile after the other.
      train: whether there is a backward pass.
    """
    most = FORWARD_TILE if jax.default_backend() == "cpu" else ACCELERATOR_TILE
    if tile is None:
        tile = TILE if train and jax.default_backend() == "cpu" else most
    length, seen, heads = queries.shape[1], keys.shape[1], queries.shape[2]
    window = seen if window is None else min(window, seen)
    if batched is None:
        batched = length >= max(BATCHED_FROM_WINDOWS * window, BATCHED_FROM_TOKENS)
    options: dict[str, Any] = {"window": window, "score": score, "cap": cap, "has_first": first is not None}
    arrays: tuple[Array, ...] = queries, keys, values, query_positions, key_positions
    if first is not None:
        arrays = (*arrays, first)
    if dropout is not None:
        if dropout.lines is None:
            dropout = dropout.numbered(*queries.shape[:3])
        assert dropout.lines is not None
        arrays, options = (*arrays, dropout.lines), options | {"dropout": dropout}
    if not batched:
        block = min(length, block or max(BLOCK, math.ceil(length / MAX_BLOCKS)))
        pieces = math.ceil(block / max(MIN_CHUNK, most // (heads * seen)))
        causal = functools.partial(_causal, block=block, pieces=pieces, **options)
        return _by_rows(causal, arrays, heads * block * seen, tile, recompute=pieces == 1)

    block = min(length, block or max(16, math.ceil(window / 2)))
    reach = block + window - 1

    def cut(x: Array, seen: int, fill: int = 0) -> Array:
        pieces = _cut(jnp.broadcast_to(x, (len(queries), *x.shape[1:])), block, seen, length, fill)
        return pieces.reshape(-1, *pieces.shape[2:])

    sizes, fills = (block, reach, reach, block, reach, block, block), (0, 0, 0, -1, -1, 0, 0)
    blocks = tuple(cut(*of_array) for of_array in zip(arrays, sizes, fills, strict=False))
    out = _by_rows(functools.partial(_masked, **options), blocks, heads * block * reach, tile)
    return out.reshape(len(queries), -1, *out.shape[2:])[:, :length]


def _masked(
    queries: Array,
    keys: Array,
    values: Array,
    query_positions: Array,
    key_positions: Array,
    *of_queries: Array,
    has_first: bool,
    window: int,
    dropout: WeightDropout | None = None,
    **options: Any,
) -> Float[Array, "B T maps Hv"]:
    """`attend` with the mask of positions; the other arrays of the queries are `first` and the lines of the dropout."""
    first = of_queries[0] if has_first else None
    mask = attention_mask(query_positions, key_positions, window, first)
    own = None if dropout is None else dropout._replace(lines=of_queries[-1])
    return attend(queries, keys, values, mask, dropout=own, **options)


def _causal(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K Hv"],
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    *more: Array,
    block: int,
    pieces: int,
    window: int,
    **options: Any,
) -> Float[Array, "B T maps Hv"]:
    """Each block of queries reads the keys of its window up to its own end, in so many pieces one after the other."""
    (rows, length), seen = queries.shape[:2], keys.shape[1]
    attended: Callable[..., Array] = functools.partial(_masked, window=window, **options)
    of_queries, fills = (queries, query_positions, *more), (0, -1, 0, 0)
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, seen - length + start - window + 1)
        keys_at = slice(first, seen - length + stop)
        seen_by = keys[:, keys_at], values[:, keys_at]
        own, own_keys_at = [x[:, start:stop] for x in of_queries], key_positions[:, keys_at]
        if pieces == 1:
            out.append(attended(own[0], *seen_by, own[1], own_keys_at, *own[2:]))
            continue
        chunk = math.ceil((stop - start) / pieces)
        cut = [_cut(x, chunk, chunk, stop - start, fill) for x, fill in zip(own, fills, strict=False)]

        def one(at, seen_by=seen_by, own_keys_at=own_keys_at):
            return attended(at[0], *seen_by, at[1], own_keys_at, *at[2:])

        chunks = jax.lax.map(_recomputed(one), tuple(jnp.moveaxis(x, 1, 0) for x in cut))
        out.append(jnp.moveaxis(chunks, 0, 1).reshape(rows, -1, *chunks.shape[3:])[:, : stop - start])
    return jnp.concatenate(out, axis=1)


def _by_rows(
    function: Callable[..., Array],
    arrays: tuple[Array, ...],
    scores: int,
    tile: int,
    recompute: bool = True,
) -> Array:
    """function(*arrays), so many rows after the others that a tile of scores is computed at once.

    Args:
      function: computes each row apart. An array with one row serves all of them.
      scores: that a row has at once.
      recompute: whether the backward pass computes each tile again.
    """
    rows = len(arrays[0])
    tiles = math.ceil(rows / max(1, tile // scores))
    if tiles == 1:
        return function(*arrays)
    size = math.ceil(rows / tiles)
    tiles = math.ceil(rows / size)
    mapped = [x for x in arrays if len(x) == rows]

    def padded(x: Array) -> Array:
        widths = [(0, tiles * size - rows), *[(0, 0)] * (x.ndim - 1)]
        return (jnp.pad(x, widths) if tiles * size > rows else x).reshape(tiles, size, *x.shape[1:])

    def one_tile(at):
        taken = iter(at)
        return function(*(next(taken) if len(x) == rows else x for x in arrays))

    one_tile = _recomputed(one_tile) if recompute else one_tile
    out = jax.lax.map(one_tile, tuple(map(padded, mapped)))
    return out.reshape(-1, *out.shape[2:])[:rows]


def _recomputed(function: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """The function, computed again in the backward pass but for its random numbers."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(KEPT))


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
