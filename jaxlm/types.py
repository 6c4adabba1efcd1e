"""The axis legend, type aliases that signatures share, and the size of a tree.

B batch, T query length, S key or cache length, D model width, N query heads, K key/value heads, G = N / K,
H head width, F feed-forward width, V vocabulary, L layers, W window.
"""

from collections.abc import Sequence, Set
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Int

Params: TypeAlias = dict[str, Any]
"""Parameters: nested dicts of arrays."""
Tokens: TypeAlias = Int[Array | np.ndarray, "B T"]
Logits: TypeAlias = Float[Array, "B T V"]
Number: TypeAlias = int | float | np.number | Array
"""A number, or a scalar array, as `optax.inject_hyperparams` makes of a hyperparameter."""
Count: TypeAlias = int | np.integer | Array
"""A whole number, or a scalar array of one."""
TokenIds: TypeAlias = Sequence[int] | Set[int] | np.ndarray | Array
"""Several token ids."""


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
