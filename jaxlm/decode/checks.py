"""What the functions of this folder refuse alike."""

import numpy as np
from jaxtyping import Integer

from jaxlm.errors import UserError


def check_count(name: str, value: object) -> None:
    """Refuses all but whole numbers from 1 on."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} = {value!r}: give a whole number of at least 1")


def check_ids(name: str, ids: Integer[np.ndarray, "..."], vocab_size: int) -> None:
    """Refuses token ids outside the vocabulary."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{name} holds ids {ids.min()} to {ids.max()}: the vocabulary has 0 to {vocab_size - 1}")
