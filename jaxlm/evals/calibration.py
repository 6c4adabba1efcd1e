"""Temperature scaling: one number that divides a model's logits, so that it is as sure as it is right."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.ops.loss import target_log_probs

LOWEST, HIGHEST = 0.01, 100.0
"""Between these the temperature is sought."""
HALVINGS = 24
"""ln(HIGHEST / LOWEST) / 2^24 is below float32's rounding."""


def fit_temperature(logits: Float[Array | np.ndarray, "*rows V"], targets: Int[Array | np.ndarray, "*rows"]) -> float:
    """The temperature T that minimises the mean of -log softmax(logits / T)[target].

    The mean is convex in 1 / T, so its slope has one zero, which bisection of log T finds. It is sought from 0.01 to
    100, which is returned for logits that tell less than nothing. If every target is the likeliest token, any T will
    do at which the mean is zero but for float32's rounding.

    References:
      C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On calibration of modern neural networks", arXiv 1706.04599,
      section 4.2.
    """
    return float(_bisect(jnp.asarray(logits), jnp.asarray(targets)))


@jax.jit
def _bisect(logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]) -> Float[Array, ""]:
    def nll(inverse: Float[Array, ""]) -> Float[Array, ""]:
        return -target_log_probs(inverse * logits, targets).mean()

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        too_sure = jax.grad(nll)(jnp.exp(-middle)) > 0
        return jnp.where(too_sure, middle, low), jnp.where(too_sure, high, middle)

    bounds = jnp.log(LOWEST), jnp.log(HIGHEST)
    low, high = jax.lax.fori_loop(0, HALVINGS, halve, bounds)
    return jnp.exp((low + high) / 2)
