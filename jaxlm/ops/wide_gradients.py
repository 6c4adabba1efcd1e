"""Broadcasts and lookups whose gradients are summed in at least float32.

The gradient of a broadcast is a sum over many rows, and autodiff sums it in the type of the rows. In bfloat16 XLA:CPU
then adds small numbers to a large sum that cannot hold them: at 64 x 64 tokens the gradient of a value bias was 27%
off, and the error grows with the batch (docs/log.md). PyTorch sums in float32. In float32 and wider these functions
are the plain operations. Reverse mode only (no jvp) in narrower types.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def add(x: Float[Array, "*left"], y: Float[Array, "*right"]) -> Float[Array, "*result"]:
    """x + y of equally many axes, those of length 1 stretched, computed and returned in the type of x.

    `y` may be wider, such as a float32 bias added to bfloat16 activations; its gradient then stays wide.
    """
    if x.dtype == _at_least_float32(x):
        return x + y.astype(x.dtype)
    return _add(x, y, x.shape, y.shape, y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _add(x, y, x_shape, y_shape, y_dtype):
    return x + y.astype(x.dtype)


def _add_forward(x, y, *types):
    return _add(x, y, *types), None


def _add_backward(x_shape, y_shape, y_dtype, _, d_sum):
    return _summed_to(d_sum, x_shape, d_sum.dtype), _summed_to(d_sum, y_shape, y_dtype)


_add.defvjp(_add_forward, _add_backward)


def _summed_to(gradient: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The gradient of a broadcast from this shape, which has as many axes."""
    stretched = tuple(axis for axis, size in enumerate(shape) if size < gradient.shape[axis])
    return gradient.astype(_at_least_float32(gradient)).sum(stretched, keepdims=True).astype(dtype)


def look_up(table: Float[Array, "rows D"], tokens: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of a table. An id outside gives NaN, where JAX would clamp it or count a negative one from the end."""
    tokens = jnp.where(tokens < 0, table.shape[0], tokens)
    if table.dtype == _at_least_float32(table):
        return _rows(table, tokens)
    return _look_up(table, tokens, len(table))


def _rows(table, tokens):
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table, tokens, num_rows):
    return _rows(table, tokens)


def _look_up_forward(table, tokens, num_rows):
    return _rows(table, tokens), tokens


def _look_up_backward(num_rows, tokens, d_rows):
    wide = _at_least_float32(d_rows)
    total = jnp.zeros((num_rows, d_rows.shape[-1]), wide).at[tokens].add(d_rows.astype(wide), mode="drop")
    return total.astype(d_rows.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _at_least_float32(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
