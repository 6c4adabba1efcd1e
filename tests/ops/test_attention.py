"""The pure functions below the model: rope, masks, cache, attention, matmul, loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.config import ModelConfig
from jaxlm.model.cache import LayerCache, init_cache
from jaxlm.ops.attention import attend, masked_softmax
from jaxlm.ops.loss import cross_entropy, token_losses
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.matmul import matmul
from jaxlm.ops.positions import apply_rope, rope_angles, sinusoids
from jaxlm.ops.self_attention import self_attention


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_scores_depend_on_the_distance_alone(layout):
    queries, keys = normal(0, 1, 1, 1, 6), normal(1, 1, 1, 1, 6)

    def score(query_position, key_position):
        q, k = (
            apply_rope(x, rope_angles(jnp.array([[p]]), 6, 100.0), layout)
            for x, p in ((queries, query_position), (keys, key_position))
        )
        return float((q * k).sum())

    assert score(5, 2) == pytest.approx(score(905, 902), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2  # fails when nothing is rotated


def test_rope_layouts_rotate_the_pairs_they_say():
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
    angles = jnp.array([[[0.5, 0.1]]])
    a, b = np.exp(0.5j) * np.array([1 + 3j, 1 + 2j]), np.exp(0.1j) * np.array([2 + 4j, 3 + 4j])
    half, interleaved = (np.asarray(apply_rope(x, angles, layout)).ravel() for layout in ("half", "interleaved"))
    assert_close(half, [a[0].real, b[0].real, a[0].imag, b[0].imag], FLOAT32)
    assert_close(interleaved, [a[1].real, a[1].imag, b[1].real, b[1].imag], FLOAT32)


def test_rope_angles_follow_the_formula_with_their_theta():
    expected = 11 * np.array([500.0 ** (-2 * i / 10) for i in range(5)])
    assert_close(rope_angles(jnp.array([[11]]), 10, 500.0)[0, 0], expected, FLOAT32)


def test_sinusoids_follow_the_formula():
    expected = [f(7 / 10000 ** (2 * i / 6)) for i in range(3) for f in (np.sin, np.cos)]
    assert_close(sinusoids(jnp.array([[7]]), 6)[0, 0], expected, FLOAT32)


def test_masks_literally():
    positions = jnp.arange(4)[None]
    assert attention_mask(positions, positions)[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert attention_mask(positions, positions, window=2)[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_mask_of_a_ring_with_an_empty_slot_and_a_padded_query():
    queries, ring = jnp.array([[5, 6, -1]]), jnp.array([[6, -1, 4, 5]])
    assert attention_mask(queries, ring, window=2)[0].astype(int).tolist() == [[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]


def layer(slots, batch=2):
    keys, values = jnp.zeros((batch, 1, 1, slots)), jnp.zeros((batch, 1, slots, 1))
    return LayerCache(keys, values, jnp.full((batch, slots), -1, jnp.int32))


def write(cache, positions):
    positions = jnp.array(positions, jnp.int32)
    content = positions[..., None, None].astype(jnp.float32)
    return cache.write(content, 10 * content, positions)


def test_a_ring_keeps_the_latest_and_skips_padding():
    cache = write(layer(3), [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]])
    assert cache.positions.tolist() == [[3, 4, 2], [0, 1, -1]]
    assert cache.keys[..., 0, 0].tolist() == [[3, 4, 2], [0, 1, 0]]
    cache = write(cache, [[5], [2]])
    assert cache.positions.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert cache.values[..., 0, 0].tolist() == [[30, 40, 50], [0, 10, 20]]


def test_a_padded_row_leaves_its_slots_alone():
    cache = write(write(layer(3), [[0, 1, 2], [0, 1, 2]]), [[3], [-1]])
    assert cache.positions.tolist() == [[3, 1, 2], [0, 1, 2]]


def test_windowed_layers_keep_no_more_than_their_window():
    cfg = ModelConfig(vocab_size=5, max_seq_len=30, num_layers=3, embed_dim=6, num_heads=2, window=(4, None, 40))
    cache = init_cache(cfg, 7, 11)
    assert [entry.positions.shape for entry in cache.layers] == [(7, 4), (7, 11), (7, 11)]
    with pytest.raises(ValueError, match="31 tokens are beyond .* max_seq_len = 30: give a smaller capacity"):
        init_cache(cfg, 1, 31)


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


def test_matmul_has_the_gradients_autodiff_gives():
    x, kernel, weight = normal(0, 3, 5, 7), normal(1, 7, 11), normal(2, 3, 5, 11)
    ours = jax.grad(lambda a, b: (matmul(a, b) * weight).sum(), (0, 1))(x, kernel)
    plain = jax.grad(lambda a, b: (jnp.matmul(a, b) * weight).sum(), (0, 1))(x, kernel)
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b, FLOAT32)


def test_matmul_of_bfloat16_can_return_float32():
    x, kernel = normal(0, 3, 256).astype(jnp.bfloat16), normal(1, 256, 5).astype(jnp.bfloat16)
    out, pull = jax.vjp(lambda a, b: matmul(a, b, jnp.dtype("float32")), x, kernel)
    assert out.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert_close(out, exact, FLOAT32)  # rounded to bfloat16 it would be off by 4e-3
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16, jnp.bfloat16]


def test_cross_entropy_by_hand_and_with_weights():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]))
    targets = jnp.array([[1, 2]])
    assert_close(token_losses(logits + 3, targets), -np.log([[0.25, 0.7]]), FLOAT32)
    assert float(cross_entropy(logits, targets)) == pytest.approx(-np.log([0.25, 0.7]).mean(), rel=1e-5)
    weighted = cross_entropy(logits, targets, jnp.array([[0.0, 2.0]]))
    assert float(weighted) == pytest.approx(-np.log(0.7), rel=1e-5)


def test_self_attention_of_bfloat16_takes_its_softmax_in_float32():
    x = 2 * normal(0, 256, 64)
    weights = [normal(i, 64, 64) / 8 for i in (1, 2, 3)]
    rounded = [a.astype(jnp.bfloat16) for a in (x, *weights)]
    exact = self_attention(*(a.astype(jnp.float32) for a in rounded), True)
    out, pull = jax.vjp(lambda *a: self_attention(*a, True), *rounded)
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16] * 4
    error = jnp.sqrt(((out.astype(jnp.float32) - exact) ** 2).mean() / (exact**2).mean())
    assert float(error) < 0.0075  # 0.0097 with a softmax in bfloat16
