"""Attention in blocks against the whole mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import assert_same, assert_same_attention, normal, value_and_grads
from tolerances import assert_close

from jaxlm.ops import blocked_attention
from jaxlm.ops.attention import WeightDropout, attend
from jaxlm.ops.attention_scores import multiplicative_scores, summed
from jaxlm.ops.blocked_attention import TILE, blocked_attend
from jaxlm.ops.masks import attention_mask

pytestmark = pytest.mark.x64


CLOSE = 1e-12
"""Blocked and masked attention sum the same products: only the order of the sums may differ."""


WIDE_GRID = [
    pytest.param(length, block, tile, batched, marks=pytest.mark.slow)
    for length in (3, 17, 31, 67, 129)
    for block, tile in ((None, TILE), (1, TILE), (2, 200), (5, 100), (8, TILE), (64, 3000))
    for batched in (False, True)
]


@pytest.mark.parametrize(
    ("length", "block", "tile", "batched"),
    [
        (1, None, TILE, True),
        (13, None, TILE, True),
        (13, 3, 100, True),
        (29, 4, TILE, True),
        (13, None, TILE, False),
        (13, 3, 100, False),
        (29, 4, TILE, False),
        (29, 7, 800, False),
        *WIDE_GRID,
    ],
)
def test_blocked_attention_is_the_masked_one_for_every_window(length, block, tile, batched):
    queries, keys, values = normal(0, 3, length, 4, 3), normal(1, 3, length, 2, 3), normal(2, 3, length, 2, 5)
    positions, weight = jnp.arange(length)[None], normal(99, 3, length, 4, 5)

    @jax.jit
    def masked(window):  # traced: one program serves every window
        mask = attention_mask(positions, positions, window)
        value, pull = jax.vjp(functools.partial(attend, mask=mask), queries, keys, values)
        return value, pull(weight)

    @functools.partial(jax.jit, static_argnums=0)
    def blocked(window):
        at = {
            "query_positions": positions,
            "key_positions": positions,
            "window": window,
            "batched": batched,
            "block": block,
            "tile": tile,
        }
        value, pull = jax.vjp(functools.partial(blocked_attend, **at), queries, keys, values)
        return value, pull(weight)

    for window in (1, 2, 5, 40) if length < 30 else (1, 2, 3, 7, 16, 31, 67, 128, 200):
        assert_same_attention(blocked(window), masked(window), CLOSE, one_key=min(window, length) == 1)


@pytest.mark.parametrize(
    ("batched", "block", "tile"), [(True, 3, TILE), (True, 3, 40), (False, 3, TILE), (False, 4, 40)]
)
@pytest.mark.parametrize("window", [None, 4])
def test_blocked_attention_with_padded_rows_scores_and_caps(window, batched, block, tile):
    queries, keys, values = normal(0, 2, 11, 4, 3), normal(1, 2, 11, 2, 3), normal(2, 2, 11, 2, 3)
    positions = jnp.where(jnp.arange(11)[None] < jnp.array([[11], [6]]), jnp.arange(11)[None], -1)
    score = summed(functools.partial(multiplicative_scores, weight=normal(3, 2, 2, 3, 3)))
    at = {"query_positions": positions, "key_positions": positions, "window": window}
    blocked = functools.partial(blocked_attend, **at, batched=batched, block=block, tile=tile)
    masked = functools.partial(attend, mask=attention_mask(positions, positions, window))
    ours, theirs = (
        value_and_grads(functools.partial(f, score=score, cap=1.5), queries, keys, values) for f in (blocked, masked)
    )
    assert_same(ours, theirs, CLOSE)
    assert (np.asarray(ours[0])[1, 6:] == 0).all()


@pytest.mark.parametrize(
    "before", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_blocked_attention_after_a_cache(before):
    keys, values, queries = normal(0, 2, 12 + before, 2, 3), normal(1, 2, 12 + before, 2, 3), normal(2, 2, 12, 4, 3)
    positions = jnp.arange(12 + before)[None] - 2  # the first slots are empty: position -1 or below
    positions = jnp.maximum(positions, -1)
    for window in (5, None):
        at = positions[:, before:], positions, window
        masked = attend(queries, keys, values, attention_mask(*at))
        for batched, block, tile in (
            (True, None, TILE),
            (True, 2, TILE),
            (True, 5, 90),
            (False, 5, TILE),
            (False, 5, 90),
        ):
            blocked = blocked_attend(queries, keys, values, *at, batched=batched, block=block, tile=tile)
            assert_close(blocked, masked, CLOSE)


def test_a_long_block_is_computed_in_chunks_with_the_same_result(monkeypatch):
    queries, keys, values = normal(0, 2, 150, 4, 3), normal(1, 2, 150, 2, 3), normal(2, 2, 150, 2, 3)
    positions = jnp.arange(150)[None]
    masked = functools.partial(attend, mask=attention_mask(positions, positions))
    blocked = functools.partial(blocked_attend, query_positions=positions, key_positions=positions, block=75, tile=1)
    theirs = value_and_grads(masked, queries, keys, values)
    assert_same(value_and_grads(blocked, queries, keys, values), theirs, CLOSE)
    lowered = jax.jit(blocked).lower(queries, keys, values).as_text()
    monkeypatch.setattr(blocked_attention, "FORWARD_TILE", 4 * 150 * 20)
    monkeypatch.setattr(blocked_attention, "MIN_CHUNK", 8)
    assert_same(value_and_grads(blocked, queries, keys, values), theirs, CLOSE)
    chunked = jax.jit(
        functools.partial(blocked_attend, query_positions=positions, key_positions=positions, block=75, tile=1)
    )
    assert chunked.lower(queries, keys, values).as_text().count("while") > lowered.count("while")


@pytest.mark.parametrize(
    ("window", "batched", "block", "tile"),
    [(None, False, 32, TILE), (None, False, 32, 2000), (6, True, 4, TILE), (6, True, 4, 300), (6, False, 16, TILE)],
)
def test_dropout_of_blocks_zeroes_weights_at_random_in_both_passes(window, batched, block, tile):
    length, rate = 32, 0.25
    queries, keys = normal(0, 4, length, 2, 3), normal(1, 4, length, 2, 3)
    values = jnp.broadcast_to(jnp.eye(length)[None, :, None], (4, length, 2, length))  # the result is the weights
    positions = jnp.arange(length)[None]
    dropout = WeightDropout(rate, jax.random.key(3))
    at = {"query_positions": positions, "key_positions": positions, "window": window}
    blocked = functools.partial(blocked_attend, **at, batched=batched, block=block, tile=tile, dropout=dropout)
    mask = attention_mask(positions, positions, window)
    weights, dropped = attend(queries, keys, values, mask), blocked(queries, keys, values)
    kept = dropped > 0
    seen = np.broadcast_to(mask[:, :, None], kept.shape)
    assert_close(dropped, jnp.where(kept, weights / (1 - rate), 0), CLOSE)
    assert abs(kept[seen].mean() - (1 - rate)) < 0.04
    for row in range(1, 4):
        assert (kept[row] != kept[0])[seen[0]].mean() > 0.2, "every row draws its own numbers"
    if window is None:
        first, last = np.asarray(kept[0, 15, :, :15]), np.asarray(kept[0, 31, :, :15])
        assert (first != last).any(), "so does every block"

    def masked(queries, keys, values):
        return jnp.einsum(
            "btns,bsnh->btnh",
            jnp.where(
                kept,
                attend(queries, keys, jnp.broadcast_to(jnp.eye(length)[None, :, None], (4, length, 2, length)), mask)
                / (1 - rate),
                0,
            ),
            values,
        )

    inputs = queries, keys, normal(2, 4, length, 2, 3)
    assert_same(value_and_grads(blocked, *inputs), value_and_grads(masked, *inputs), CLOSE)


@pytest.mark.parametrize("window", [8, None])
def test_memory_of_blocks_grows_with_the_length_and_that_of_the_mask_with_its_square(window):
    def peak(length, blocked, tile=TILE):
        positions = jnp.arange(length)[None]

        def loss(q, k, v):
            if blocked:
                return blocked_attend(q, k, v, positions, positions, window, tile=tile).sum()
            return attend(q, k, v, attention_mask(positions, positions, window)).sum()

        shape = jax.ShapeDtypeStruct((1, length, 16 if window is None else 1, 4), jnp.float64)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    if window is None:
        assert peak(8192, blocked=True) / peak(2048, blocked=True) < 5
    else:
        assert peak(2048, blocked=True) / peak(512, blocked=True) < 4.5
        assert peak(2048, blocked=False) / peak(512, blocked=False) > 10
        assert peak(16384, blocked=True, tile=30_000) < 0.8 * peak(16384, blocked=True)
