"""What every optimizer promises of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import after, every, make, numbers

pytestmark = pytest.mark.x64


@every
def test_float64_stays_float64(name):
    params = numbers(0, dtype=np.float64)
    state, _, updates, moved = after(make(name), params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float64), jnp.dtype(jnp.int32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, moved))} == {jnp.dtype(jnp.float64)}
