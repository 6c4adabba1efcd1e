"""The same in float64, with windows and room for a cache that grows."""

import jax
import numpy as np
from tolerances import FLOAT64

from jaxlm.config import ModelConfig

WIDE = {"dtype": "float64", "param_dtype": "float64"}
CFG = ModelConfig(
    vocab_size=11, max_seq_len=70, num_layers=2, embed_dim=12, num_heads=3, position="rope", window=(3, None), **WIDE
)
KEY = jax.random.key(3)


def assert_same(out, reference):
    """Two results of `generate` are equal, log-probabilities to rounding."""
    np.testing.assert_array_equal(out.tokens, reference.tokens)
    np.testing.assert_allclose(out.log_probs, reference.log_probs, atol=FLOAT64)
    np.testing.assert_array_equal(out.lengths, reference.lengths)
