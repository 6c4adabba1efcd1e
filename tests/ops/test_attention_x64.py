"""The implementations of attention against one another and against formulas written out, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32, FLOAT64, assert_close

from jaxlm.ops.attention import attend, cudnn_attend, softcap
from jaxlm.ops.attention_scores import additive_scores, concat_scores, dot_scores, multiplicative_scores, summed
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.self_attention import self_attention, self_attention_grads
from jaxlm.ops.sliding_window import local_attend

pytestmark = pytest.mark.x64

LOCAL = 1e-12
"""Local and masked attention sum the same products: only the order of the sums may differ."""


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def value_and_grads(function, *inputs):
    """(value, gradients of sum(value * w), w random), compiled as one program."""

    @jax.jit
    def both(*inputs):
        value, pull = jax.vjp(function, *inputs)
        return value, pull(normal(99, *value.shape))

    return both(*inputs)


def assert_same(ours, theirs, tolerance):
    jax.tree.map(functools.partial(assert_close, tolerance=tolerance), ours, theirs)


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


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_fused_call_computes_the_same_function(window):
    """On the device it is cuDNN; the arguments are checked here with XLA's implementation of the same call."""
    queries, keys, values = normal(0, 2, 7, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    positions = jnp.arange(7)[None]
    masked = functools.partial(attend, mask=attention_mask(positions, positions, window))
    fused = functools.partial(cudnn_attend, window=window, implementation="xla")
    ours, theirs = (value_and_grads(f, queries, keys, values) for f in (fused, masked))
    assert_same(ours, theirs, FLOAT32)  # XLA's implementation takes its softmax in float32


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is an NVIDIA GPU's")
@pytest.mark.parametrize("window", [None, 32])
def test_cudnn_is_the_masked_attention_in_bfloat16(window):
    queries, keys, values = (normal(i, 2, 128, n, 64).astype(jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    positions = jnp.arange(128)[None]
    masked = functools.partial(attend, mask=attention_mask(positions, positions, window))
    exact = value_and_grads(masked, *(x.astype(jnp.float64) for x in (queries, keys, values)))
    ours = value_and_grads(functools.partial(cudnn_attend, window=window), queries, keys, values)
    assert_same(ours, exact, 0.02)


def each_pair(queries, keys):
    """(b, k, g, t, s, query vector, key vector) of grouped queries and keys."""
    batch, length, kv_heads, group, _ = queries.shape
    for b, k, g, t, s in itertools.product(*map(range, (batch, kv_heads, group, length, keys.shape[1]))):
        yield (b, k, g, t, s), queries[b, t, k, g], keys[b, s, k]


def test_scores_follow_their_formulas():
    queries, keys = normal(0, 2, 3, 2, 3, 5), normal(1, 2, 4, 2, 5)
    square, key_w, query_w = normal(2, 2, 3, 5, 5), normal(3, 2, 3, 5), normal(4, 2, 3, 5)
    key_a, query_a, out_a = normal(5, 2, 3, 5, 7), normal(6, 2, 3, 5, 7), normal(7, 2, 3, 7)
    made = {
        "dot": dot_scores(queries, keys),
        "multiplicative": multiplicative_scores(queries, keys, square),
        "concat": concat_scores(queries, keys, key_w, query_w),
        "additive": additive_scores(queries, keys, key_a, query_a, out_a),
    }
    expected = {name: np.zeros((2, 2, 3, 3, 4)) for name in made}
    for place, q, key in each_pair(np.asarray(queries), np.asarray(keys)):
        head, both = place[1:3], np.concatenate([key, q])
        weight = np.concatenate([key_a[head], query_a[head]])  # [2 H, A]
        expected["dot"][place] = key @ q / np.sqrt(5)
        expected["multiplicative"][place] = key @ np.asarray(square[head]) @ q / np.sqrt(5)
        expected["concat"][place] = np.concatenate([key_w[head], query_w[head]]) @ both
        expected["additive"][place] = np.asarray(out_a[head]) @ np.tanh(weight.T @ both)
    for name, scores in made.items():
        assert_close(scores, expected[name], FLOAT64)
    assert_close(summed(dot_scores)(queries, keys), made["dot"].sum(axis=2, keepdims=True), FLOAT64)


def test_softcap_bounds_large_scores_and_keeps_small_ones():
    x = jnp.array([-1e6, -1e-3, 0.0, 1e-3, 1e6])
    np.testing.assert_allclose(softcap(x, 30.0), [-30, -1e-3, 0, 1e-3, 30], rtol=1e-8)
    np.testing.assert_array_equal(softcap(x, None), x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_the_derivative_by_hand_is_that_of_autodiff(causal, batch):
    x = normal(0, *batch, 5, 7)
    weights = normal(1, 7, 4), normal(2, 7, 4), normal(3, 7, 3)

    def plain(x, w_k, w_q, w_v):
        scores = jnp.einsum("...tk,...sk->...ts", x @ w_q, x @ w_k) / 2
        if causal:
            scores = scores + jnp.where(jnp.tri(5) > 0, 0.0, -jnp.inf).reshape((1,) * len(batch) + (5, 5))
        return jax.nn.softmax(scores, axis=-1) @ (x @ w_v)

    explicit = functools.partial(self_attention, causal=causal)
    theirs = value_and_grads(plain, x, *weights)
    ours = value_and_grads(lambda *inputs: self_attention(*inputs, causal), x, *weights)
    assert_same(ours, theirs, FLOAT64)
    assert_close(explicit(x, *weights), theirs[0], FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_every_intermediate_derivative_is_that_of_autodiff(causal):
    x, (w_k, w_q, w_v) = normal(0, 2, 5, 7), (normal(i, 7, width) for i, width in ((1, 4), (2, 4), (3, 3)))
    upstream = normal(4, 2, 5, 3)
    grads = self_attention_grads(x, w_k, w_q, w_v, upstream, causal)
    mask = np.tril(np.ones((5, 5), bool)) if causal else np.ones((5, 5), bool)

    def loss(probes):
        """The loss with a zero added to each intermediate: its derivative in the zero is that in the intermediate."""
        k, q, v = (x @ w + probes[name] for w, name in ((w_k, "K"), (w_q, "Q"), (w_v, "V")))
        scaled = (q @ k.swapaxes(-1, -2) + probes["A_w"]) / 2
        a_sig = jax.nn.softmax(jnp.where(mask[None], scaled, -jnp.inf), axis=-1) + probes["A_sig"]
        return (a_sig @ v * upstream).sum()

    shapes = {"K": (2, 5, 4), "Q": (2, 5, 4), "V": (2, 5, 3), "A_w": (2, 5, 5), "A_sig": (2, 5, 5)}
    expected = jax.grad(loss)({name: jnp.zeros(shape) for name, shape in shapes.items()})
    for name in shapes:
        assert_close(getattr(grads, f"dLd{name}"), expected[name], FLOAT64)


def test_the_derivative_by_hand_is_what_jax_uses():
    x, weight = normal(0, 5, 7), normal(1, 7, 7)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: self_attention(x, weight, weight, weight), (x,), (x,))
