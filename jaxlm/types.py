"""The axis legend, type aliases that signatures share, and the size of a tree.

B batch, T query length, S key or cache length, D model width, N query heads, K key/value heads, G = N / K,
H head width, F feed-forward width, V vocabulary, L layers, W window.
"""

from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Int

Params: TypeAlias = dict[str, Any]
"""Parameters: nested dicts of arrays."""
Tokens: TypeAlias = Int[Array | np.ndarray, "B T"]
Logits: TypeAlias = Float[Array, "B T V"]
Number: TypeAlias = int | float | Array
"""A hyperparameter: a number, or a scalar array where `optax.inject_hyperparams` makes it one."""


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
