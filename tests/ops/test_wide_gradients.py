"""Sums of gradients in at least float32, where autodiff sums in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import variant
from support import built, random_tokens
from tolerances import assert_close

from jaxlm.model.build import build_model
from jaxlm.ops.wide_gradients import add, look_up
from jaxlm.training.step import batch_loss

ROWS = jax.random.normal(jax.random.key(0), (64, 63, 5)) + 1.0
"""Their mean is not zero, so that a sum grows until a bfloat16 cannot hold what is added to it."""


def relative(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def weighted(function, dtype):
    """The gradient in `y` of a sum over the rows, each weighted by ROWS."""
    return jax.jit(jax.grad(lambda y: (function(jnp.zeros(ROWS.shape, dtype), y) * ROWS.astype(dtype)).sum()))


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 63, 5), (64, 1, 1)])
@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_broadcast_is_summed_in_float32(shape, bias_dtype):
    bias = jnp.zeros(shape, bias_dtype)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    expected = ROWS.astype(jnp.bfloat16).astype(float).sum(axes, keepdims=True)
    grad = weighted(add, jnp.bfloat16)(bias)
    assert (grad.shape, grad.dtype) == (shape, bias_dtype)
    assert relative(grad, expected) < (1e-6 if bias_dtype == "float32" else 4e-3)


def test_autodiff_alone_would_be_off():
    """If this fails, JAX sums in float32 by itself, and `wide_gradients` can go."""
    bias = jnp.zeros((1, 1, 5), jnp.bfloat16)
    grad = weighted(lambda x, y: x + y, jnp.bfloat16)(bias)
    assert relative(grad, ROWS.sum((0, 1), keepdims=True)) > 0.1


def test_both_sides_of_a_sum_get_their_gradients():
    x, y = jnp.zeros((3, 1, 4), jnp.bfloat16), jnp.zeros((1, 5, 4), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(1), (3, 5, 4))

    def loss(x, y):
        total = add(x, y)
        assert total.shape == (3, 5, 4)
        return (total * weights.astype(total.dtype)).sum()

    d_x, d_y = jax.grad(loss, (0, 1))(x, y)
    assert relative(d_x, weights.sum(1, keepdims=True)) < 4e-3
    assert relative(d_y, weights.sum(0, keepdims=True)) < 4e-3


def test_the_gradient_of_a_table_is_summed_in_float32():
    tokens, rows = jax.random.randint(jax.random.key(2), (64, 63), 0, 3), ROWS.astype(jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda table: (look_up(table, tokens) * rows).sum()))(jnp.zeros((3, 5), jnp.bfloat16))
    expected = np.zeros((3, 5))
    np.add.at(expected, np.asarray(tokens), np.asarray(rows, np.float64))
    assert grad.dtype == jnp.bfloat16
    assert relative(grad, expected) < 4e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_outside_a_table_give_nan_and_no_gradient(dtype):
    table, tokens = jnp.ones((3, 2), dtype), jnp.array([0, 3, -1])
    assert np.isnan(look_up(table, tokens)).any(axis=1).tolist() == [False, True, True]
    grad = jax.grad(lambda table: look_up(table, tokens)[0].sum())(table)
    assert_close(grad, jnp.array([[1, 1], [0, 0], [0, 0]], dtype), 0.0)


@pytest.mark.parametrize(
    "fields",
    [{"position": "learned"}, pytest.param({"attention_score": "additive"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_bfloat16_model_has_the_gradients_of_the_float32_one(fields):
    """Summed in bfloat16, the gradients of these value biases are 13% to 27% off."""
    cfg = variant(max_seq_len=64, **fields)
    _, params = built(cfg)
    windows = random_tokens(cfg, 64, 65)

    def gradient(dtype):
        model = build_model(variant(max_seq_len=64, dtype=dtype, **fields))
        return jax.jit(jax.grad(lambda params: batch_loss(params, model, windows)))(params)

    exact, narrow = gradient("float32"), gradient("bfloat16")
    for block in ("block_0", "block_1"):
        biases = (tree[block]["attention"]["value"]["bias"] for tree in (narrow, exact))
        assert relative(*biases) < 0.03
