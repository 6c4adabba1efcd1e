"""RoPE and sinusoids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.ops.positions import apply_rope, rope_angles, sinusoids


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_scores_depend_on_the_distance_alone(layout):
    queries, keys = normal(0, 1, 1, 1, 6), normal(1, 1, 1, 1, 6)

    def score(query_position, key_position):
        q, k = (
            apply_rope(x, rope_angles(jnp.array([[p]]), 6, 100.0), layout)
            for x, p in ((queries, query_position), (keys, key_position))
        )
        return float((q * k).sum())

    assert score(5, 2) == pytest.approx(score(905, 902), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2  # fails when nothing is rotated


def test_rope_layouts_rotate_the_pairs_they_say():
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
    angles = jnp.array([[[0.5, 0.1]]])
    a, b = np.exp(0.5j) * np.array([1 + 3j, 1 + 2j]), np.exp(0.1j) * np.array([2 + 4j, 3 + 4j])
    half, interleaved = (np.asarray(apply_rope(x, angles, layout)).ravel() for layout in ("half", "interleaved"))
    assert_close(half, [a[0].real, b[0].real, a[0].imag, b[0].imag], FLOAT32)
    assert_close(interleaved, [a[1].real, a[1].imag, b[1].real, b[1].imag], FLOAT32)


def test_rope_angles_follow_the_formula_with_their_theta():
    expected = 11 * np.array([500.0 ** (-2 * i / 10) for i in range(5)])
    assert_close(rope_angles(jnp.array([[11]]), 10, 500.0)[0, 0], expected, FLOAT32)


def test_sinusoids_follow_the_formula():
    expected = [f(7 / 10000 ** (2 * i / 6)) for i in range(3) for f in (np.sin, np.cos)]
    assert_close(sinusoids(jnp.array([[7]]), 6)[0, 0], expected, FLOAT32)
