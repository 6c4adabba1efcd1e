"""What the functions of this folder refuse alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxlm.errors import CheckError, UserError
from jaxlm.finite import first_not_finite
from jaxlm.types import Params


def check_count(name: str, value: Any) -> int:
    """A whole number from 1 on as Python's, from a number or a scalar array of NumPy or JAX.

    Raises:
      UserError: anything else.
    """
    number = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{name} = {value!r}: give a whole number of at least 1")
    return number


def check_ids(name: str, ids: Integer[np.ndarray, "..."], vocab_size: int) -> None:
    """Refuses token ids outside the vocabulary."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{name} holds ids {ids.min()} to {ids.max()}: the vocabulary has 0 to {vocab_size - 1}")


def only_finite(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """The logits with NaN for infinity: softmax, its logarithm and their sums are then NaN for the whole row."""
    return jnp.where(jnp.isfinite(logits), logits, jnp.nan)


def check_finite(
    are_finite: Bool[Array | np.ndarray, "R n"], params: Params, first: int = 0, what: str = "new token"
) -> None:
    """Refuses logits that are not finite: a number that is not is no probability, and every choice would be token 0.

    Inside jax.jit, jax.vmap and other transformations there is no value to look at, and nothing is refused.

    Args:
      are_finite: [R, n] for each row and token, whether its logits are.
      first: the index of the first of these tokens.
      what: what a token is called.

    Raises:
      CheckError: it names the first such token with its row, and the first parameter that is not finite.
    """
    if isinstance(are_finite, jax.core.Tracer):
        return
    are_finite = np.asarray(are_finite)
    if are_finite.all():
        return
    token, row = (int(index) for index in np.argwhere(~are_finite.T)[0])
    found = first_not_finite(params)
    why = (
        f"the parameter {found}: take another checkpoint"
        if found
        else ("every parameter is finite, so a sum overflowed: compute in float32 or float64 (dtype)")
    )
    raise CheckError(f"row {row}, {what} {first + token}: the model's logits are not finite; {why}")
