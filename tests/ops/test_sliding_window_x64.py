"""Attention in blocks against the whole mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import assert_same, normal, value_and_grads
from tolerances import assert_close

from jaxlm.ops.attention import attend
from jaxlm.ops.attention_scores import multiplicative_scores, summed
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.sliding_window import local_attend

pytestmark = pytest.mark.x64


LOCAL = 1e-12
"""Local and masked attention sum the same products: only the order of the sums may differ."""


WIDE_GRID = [
    pytest.param(length, block, chunk, marks=pytest.mark.slow)
    for length in (3, 17, 31, 67, 129)
    for block, chunk in ((None, None), (1, None), (2, 12), (5, 9), (8, None), (64, 33))
]


@pytest.mark.parametrize(
    ("length", "block", "chunk"),
    [(1, None, None), (13, None, None), (13, 3, None), (29, 4, None), (29, 3, 8), *WIDE_GRID],
)
def test_local_attention_is_the_masked_one_for_every_window(length, block, chunk):
    queries, keys, values = normal(0, 2, length, 4, 3), normal(1, 2, length, 2, 3), normal(2, 2, length, 2, 5)
    positions, weight = jnp.arange(length)[None], normal(99, 2, length, 4, 5)

    @jax.jit
    def masked(window):  # traced: one program serves every window
        mask = attention_mask(positions, positions, window)
        value, pull = jax.vjp(functools.partial(attend, mask=mask), queries, keys, values)
        return value, pull(weight)

    @functools.partial(jax.jit, static_argnums=0)
    def local(window):
        at = {
            "query_positions": positions,
            "key_positions": positions,
            "window": window,
            "block": block,
            "chunk": chunk,
        }
        value, pull = jax.vjp(functools.partial(local_attend, **at), queries, keys, values)
        return value, pull(weight)

    for window in (1, 2, 5, 40) if length < 30 else (1, 2, 3, 7, 16, 31, 67, 128, 200):
        assert_same(local(window), masked(window), LOCAL)


def test_local_attention_with_padded_rows_scores_caps_and_weights_of_its_own():
    queries, keys, values = normal(0, 2, 11, 4, 3), normal(1, 2, 11, 2, 3), normal(2, 2, 11, 2, 3)
    positions = jnp.where(jnp.arange(11)[None] < jnp.array([[11], [6]]), jnp.arange(11)[None], -1)
    options = {
        "score": summed(functools.partial(multiplicative_scores, weight=normal(3, 2, 2, 3, 3))),
        "cap": 1.5,
        "on_weights": lambda weights: weights**2,
    }
    local = functools.partial(local_attend, query_positions=positions, key_positions=positions, window=4, block=3)
    masked = functools.partial(attend, mask=attention_mask(positions, positions, 4))
    ours, theirs = (value_and_grads(functools.partial(f, **options), queries, keys, values) for f in (local, masked))
    assert_same(ours, theirs, LOCAL)
    assert (np.asarray(ours[0])[1, 6:] == 0).all()


@pytest.mark.parametrize("before", [1, 4, 9])
def test_local_attention_after_a_cache(before):
    keys, values, queries = normal(0, 2, 12 + before, 2, 3), normal(1, 2, 12 + before, 2, 3), normal(2, 2, 12, 4, 3)
    positions = jnp.arange(12 + before)[None] - 2  # the first slots are empty: position -1 or below
    positions = jnp.maximum(positions, -1)
    at = positions[:, before:], positions, 5
    masked = attend(queries, keys, values, attention_mask(*at))
    for block, chunk in ((None, None), (2, None), (5, None), (2, 5)):
        assert_close(local_attend(queries, keys, values, *at, block=block, chunk=chunk), masked, LOCAL)


def test_memory_of_local_attention_grows_with_the_length_and_that_of_the_mask_with_its_square():
    def peak(length, local, chunk=None):
        positions = jnp.arange(length)[None]

        def loss(q, k, v):
            if local:
                return local_attend(q, k, v, positions, positions, 8, chunk=chunk).sum()
            return attend(q, k, v, attention_mask(positions, positions, 8)).sum()

        shape = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float64)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(2048, local=True) / peak(512, local=True) < 4.5
    assert peak(2048, local=False) / peak(512, local=False) > 10
    assert peak(2048, local=True, chunk=256) < 0.8 * peak(2048, local=True)
