"""Log-probabilities of targets, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.ops.loss import cross_entropy, target_log_probs, token_losses


def random_logits(scale, shift, shape=(512, 65)):
    """(logits, targets sampled from them, their log-probabilities in float64)."""
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal(shape) + shift).astype(np.float32)
    targets = (logits + rng.gumbel(size=shape)).argmax(-1).astype(np.int32)
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    truth = np.take_along_axis(wide, targets[:, None], 1)[:, 0] - np.log(np.exp(wide).sum(-1))
    return jnp.asarray(logits), jnp.asarray(targets), truth


def rms(found, truth):
    return np.sqrt(np.mean(np.square(np.asarray(found, np.float64) - truth)))


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (10, 0), (3, -100), (3, 1000)])
def test_rounding_is_no_worse_than_that_of_a_log_softmax(scale, shift):
    logits, targets, truth = random_logits(scale, shift)
    ours = rms(jax.jit(target_log_probs)(logits, targets), truth)
    theirs = rms(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0], truth)
    assert ours <= 1.1 * theirs < 1e-6


def test_losses_are_the_negative_and_their_mean_is_the_cross_entropy():
    logits, targets, truth = random_logits(3, 0)
    losses = token_losses(logits, targets)
    np.testing.assert_array_equal(losses, -target_log_probs(logits, targets))
    np.testing.assert_allclose(cross_entropy(logits, targets), -truth.mean(), rtol=1e-6)
    weights = jnp.arange(512) % 3 == 0
    np.testing.assert_allclose(cross_entropy(logits, targets, weights * 2.0), -truth[::3].mean(), rtol=1e-6)


def test_the_gradient_is_softmax_less_the_target():
    logits, targets, _ = random_logits(3, 5, (7, 11))
    slope = jax.grad(lambda x: token_losses(x, targets).sum())(logits)
    np.testing.assert_allclose(slope, jax.nn.softmax(logits) - np.eye(11)[targets], atol=1e-6)


def test_low_precision_is_computed_in_float32():
    logits, targets, _ = random_logits(3, 0)
    low = jnp.asarray(logits, jnp.bfloat16)
    assert target_log_probs(low, targets).dtype == jnp.float32
    np.testing.assert_array_equal(target_log_probs(low, targets), target_log_probs(low.astype(jnp.float32), targets))


def test_forbidden_logits_count_for_nothing():
    logits = jnp.array([[1.0, -jnp.inf, 2.0]])
    expected = jax.nn.log_softmax(jnp.array([1.0, 2.0]))[1]
    np.testing.assert_allclose(target_log_probs(logits, jnp.array([2])), [expected], rtol=1e-6)
    assert target_log_probs(logits, jnp.array([1]))[0] == -jnp.inf


def test_cross_entropy_by_hand_and_with_weights():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]))
    targets = jnp.array([[1, 2]])
    assert_close(token_losses(logits + 3, targets), -np.log([[0.25, 0.7]]), FLOAT32)
    assert float(cross_entropy(logits, targets)) == pytest.approx(-np.log([0.25, 0.7]).mean(), rel=1e-5)
    weighted = cross_entropy(logits, targets, jnp.array([[0.0, 2.0]]))
    assert float(weighted) == pytest.approx(-np.log(0.7), rel=1e-5)
