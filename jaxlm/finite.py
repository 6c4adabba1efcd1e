"""Numbers that are not finite, found and named."""

from typing import Any

import jax
import numpy as np

from jaxlm.errors import CheckError


def first_not_finite(tree: Any) -> str | None:
    """The first array with NaN or infinity in it, its first such value and the place: "block_1/key/kernel holds nan at
    [0, 5]"; None where all are finite. It reads every array, so it is for what has already failed.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if place := not_finite(np.asarray(leaf)):
            return f"{'/'.join(str(getattr(key, 'key', key)) for key in path)} {place}"
    return None


def check_finite_params(params: Any, where: str) -> None:
    """Refuses a tree of arrays with NaN or infinity.

    Args:
      where: what holds them, for the message.

    Raises:
      CheckError: it names the first such array with its value and the place.
    """
    if found := first_not_finite(params):
        raise CheckError(f"{where}: {found}: take a sound checkpoint")


def not_finite(array: np.ndarray) -> str | None:
    """Which value of an array is NaN or infinite first, and where: "holds nan at [0, 5]"; None = all are finite."""
    if not (jax.numpy.issubdtype(array.dtype, jax.numpy.floating) and array.size):
        return None
    wrong = ~np.isfinite(array)
    if not wrong.any():
        return None
    place = np.unravel_index(int(wrong.argmax()), array.shape)
    return f"holds {float(array[place])} at {[int(index) for index in place]}"
