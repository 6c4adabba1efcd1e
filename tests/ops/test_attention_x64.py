"""The implementations of attention against one another and against formulas written out, in float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from gradients import assert_same_attention, normal, value_and_grads
from tolerances import FLOAT32

from jaxlm.ops.attention import attend, cudnn_attend, softcap
from jaxlm.ops.masks import attention_mask

pytestmark = pytest.mark.x64


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_fused_call_computes_the_same_function(window):
    """On the device it is cuDNN; the arguments are checked here with XLA's implementation of the same call."""
    queries, keys, values = normal(0, 2, 7, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    positions = jnp.arange(7)[None]
    masked = functools.partial(attend, mask=attention_mask(positions, positions, window))
    fused = functools.partial(cudnn_attend, window=window, implementation="xla")
    ours, theirs = (value_and_grads(f, queries, keys, values) for f in (fused, masked))
    assert_same_attention(ours, theirs, FLOAT32, one_key=window == 1)  # its softmax is float32


def test_softcap_bounds_large_scores_and_keeps_small_ones():
    x = jnp.array([-1e6, -1e-3, 0.0, 1e-3, 1e6])
    np.testing.assert_allclose(softcap(x, 30.0), [-30, -1e-3, 0, 1e-3, 30], rtol=1e-8)
    np.testing.assert_array_equal(softcap(x, None), x)
