"""Matrix products in the forms that XLA's CPU backend runs fast, or runs at all."""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul_precision(name: str) -> contextlib.AbstractContextManager[None]:
    """In the block, float32 products are computed in this precision of JAX's; "default" leaves its setting as it is."""
    return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows O"]:
    """x @ kernel, accumulated and returned in `dtype` (None = the operands' type). Reverse mode only (no jvp).

    Without the barrier in the backward pass, XLA:CPU fuses the recomputation of the activation (erf) into the
    transposed copies of the operands and runs it on one thread, which took half of a training step.
    """
    return wide_einsum("...i,io->...o", x, kernel, dtype)


def wide_einsum(
    equation: str, x: Float[Array, "*left"], y: Float[Array, "*right"], dtype: DTypeLike | None = None
) -> Float[Array, "*result"]:
    """`jnp.einsum`, accumulated and returned in `dtype` (None = the operands' type).

    If the result is wider, the operands are converted first on CPU: XLA:CPU cannot run every product of bfloat16 into
    float32 ("Unsupported element type for DotThunk").
    """
    if dtype is None or dtype == x.dtype == y.dtype:
        return jnp.einsum(equation, x, y)

    def widened(x: Array, y: Array) -> Array:
        return jnp.einsum(equation, x.astype(dtype), y.astype(dtype))

    def native(x: Array, y: Array) -> Array:
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=widened, default=native)


def _forward(x, kernel, dtype):
    return matmul(x, kernel, dtype), (x, kernel)


def _backward(dtype, residuals, dy):
    x, kernel = residuals
    x, dy = jax.lax.optimization_barrier((x, dy.astype(x.dtype)))
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return jnp.matmul(dy, kernel.T), jnp.matmul(rows.T, dy_rows)


matmul.defvjp(_forward, _backward)


def transposed_product(
    x: Float[Array, "*rows R I"], y: Float[Array, "*rows R O"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows I O"]:
    """x^T y of each pair of matrices, where y is the smaller one, accumulated and returned in `dtype`.

    Computed as (y^T x)^T with y^T written out: on CPU the product of a large transposed matrix runs at a quarter of the
    speed (docs/log.md). The barriers keep XLA from undoing it.
    """
    transposed = jax.lax.optimization_barrier(y.swapaxes(-1, -2))
    return jax.lax.optimization_barrier(wide_einsum("...or,...ri->...oi", transposed, x, dtype)).swapaxes(-1, -2)
