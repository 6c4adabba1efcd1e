"""Matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
from tolerances import FLOAT32, assert_close

from jaxlm.ops.matmul import matmul


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


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
