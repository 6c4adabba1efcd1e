"""The pure functions below the model: rope, masks, cache, attention, matmul, loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.ops.attention import attend, masked_softmax


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def naive_attention(queries, keys, values, mask):
    """Row by row in NumPy."""
    batch, length, heads, width = queries.shape
    out = np.zeros((batch, length, heads, values.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        seen = np.flatnonzero(mask[b, t])
        if seen.size:
            kv = n // (heads // keys.shape[2])
            scores = keys[b, seen, kv] @ queries[b, t, n] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ values[b, seen, kv]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_the_row_by_row_formula(kv_heads):
    queries, keys, values = normal(0, 2, 5, 6, 4), normal(1, 2, 7, kv_heads, 4), normal(2, 2, 7, kv_heads, 3)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.6
    mask[1, 2] = False  # a query that sees nothing gives zeros
    out = attend(queries, keys, values, jnp.asarray(mask))
    assert_close(out, naive_attention(*map(np.asarray, (queries, keys, values)), mask), FLOAT32)
    assert (np.asarray(out)[1, 2] == 0).all()


def test_scores_of_bfloat16_are_not_rounded_before_the_softmax():
    queries, keys, values = (2 * normal(i, 1, 256, 1, 64).astype(jnp.bfloat16) for i in range(3))
    mask = np.tril(np.ones((1, 256, 256), bool))
    exact = naive_attention(*(np.asarray(x, np.float64) for x in (queries, keys, values)), mask)
    out = np.asarray(attend(queries, keys, values, jnp.asarray(mask)), np.float64)
    assert np.sqrt(((out - exact) ** 2).mean() / (exact**2).mean()) < 4e-3  # 8e-3 with rounded scores


def test_a_planted_huge_key_behind_the_mask_changes_nothing():
    queries, keys, values = normal(0, 1, 3, 2, 4), normal(1, 1, 5, 2, 4), normal(2, 1, 5, 2, 4)
    mask = jnp.ones((1, 3, 5), bool).at[:, :, 4].set(False)
    planted = attend(queries, keys.at[:, 4].set(1e4), values.at[:, 4].set(1e4), mask)
    np.testing.assert_array_equal(attend(queries, keys, values, mask), planted)
    assert np.abs(attend(queries, keys.at[:, 3].set(1e4), values, mask) - planted).max() > 1e-2


def test_masked_softmax_has_the_gradient_autodiff_gives():
    scores, weight = normal(0, 3, 5), normal(1, 3, 5)
    mask = jnp.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    plain = jax.grad(lambda s: (jax.nn.softmax(jnp.where(mask, s, -1e30), where=mask) * weight).sum())(scores)
    ours = jax.grad(lambda s: (masked_softmax(s, mask) * weight).sum())(scores)
    assert_close(ours[:2], plain[:2], FLOAT32)
    assert (np.asarray(ours[2]) == 0).all()
    assert np.abs(ours[:2]).max() > 1e-2
