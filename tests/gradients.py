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
