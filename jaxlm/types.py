"""The axis legend and the aliases that signatures share.

B batch, T query length, S key or cache length, D model width, N query heads, K key/value heads, G = N / K,
H head width, F feed-forward width, V vocabulary, L layers, W window.
"""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

Params: TypeAlias = dict[str, Any]
"""Parameters: nested dicts of arrays."""
Tokens: TypeAlias = Int[Array | np.ndarray, "B T"]
Logits: TypeAlias = Float[Array, "B T V"]
