"""Values and gradients in float64, and how tests compare them."""

import functools

import jax
import jax.numpy as jnp
from tolerances import assert_close


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


def assert_same_attention(ours, theirs, tolerance, one_key, zero=1e-14):
    """(result, gradients of queries, keys and values) are equal.

    Args:
      one_key: every query sees a single key, whose weight is 1: the gradients of queries and keys are rounding errors.
      zero: how large these may be.
    """
    (result, (*of_scores, of_values)), (result_too, (*of_scores_too, of_values_too)) = ours, theirs
    assert_same([result, of_values], [result_too, of_values_too], tolerance)
    if one_key:
        assert all(abs(x).max() < zero for x in of_scores)
    else:
        assert_same(of_scores, of_scores_too, tolerance)
