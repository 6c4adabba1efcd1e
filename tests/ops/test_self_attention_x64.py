"""One attention head: its derivative by hand against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import assert_same, normal, value_and_grads
from tolerances import FLOAT64, assert_close

from jaxlm.ops.self_attention import self_attention, self_attention_grads, self_attention_values

pytestmark = pytest.mark.x64


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_the_derivative_by_hand_is_that_of_autodiff(causal, batch):
    x = normal(0, *batch, 5, 7)
    weights = normal(1, 7, 4), normal(2, 7, 4), normal(3, 7, 3)

    def plain(x, w_k, w_q, w_v):
        scores = jnp.einsum("...tk,...sk->...ts", x @ w_q, x @ w_k) / 2
        if causal:
            scores = scores + jnp.where(jnp.tri(5) > 0, 0.0, -jnp.inf).reshape((1,) * len(batch) + (5, 5))
        return jax.nn.softmax(scores, axis=-1) @ (x @ w_v)

    explicit = functools.partial(self_attention, causal=causal)
    theirs = value_and_grads(plain, x, *weights)
    ours = value_and_grads(lambda *inputs: self_attention(*inputs, causal), x, *weights)
    assert_same(ours, theirs, FLOAT64)
    assert_close(explicit(x, *weights), theirs[0], FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_every_intermediate_value_has_the_name_of_its_formula(causal):
    x, weights = normal(0, 2, 5, 7), [normal(i, 7, width) for i, width in ((1, 4), (2, 4), (3, 3))]
    values = self_attention_values(x, *weights, causal)
    for row in range(2):
        k, q, v = (np.asarray(x[row]) @ np.asarray(weight) for weight in weights)
        unmasked = np.exp(q @ k.T / 2) * (np.tril(np.ones((5, 5))) if causal else 1)
        a_sig = unmasked / unmasked.sum(axis=1, keepdims=True)
        expected = {"K": k, "Q": q, "V": v, "A_w": q @ k.T, "A_sig": a_sig, "Xnew": a_sig @ v}
        assert set(expected) == set(values._fields)
        for name, value in expected.items():
            assert_close(getattr(values, name)[row], value, FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_every_intermediate_derivative_is_that_of_autodiff(causal):
    x, (w_k, w_q, w_v) = normal(0, 2, 5, 7), (normal(i, 7, width) for i, width in ((1, 4), (2, 4), (3, 3)))
    upstream = normal(4, 2, 5, 3)
    grads = self_attention_grads(x, w_k, w_q, w_v, upstream, causal)
    mask = np.tril(np.ones((5, 5), bool)) if causal else np.ones((5, 5), bool)

    def loss(probes):
        """The loss with a zero added to each intermediate: its derivative in the zero is that in the intermediate."""
        k, q, v = (x @ w + probes[name] for w, name in ((w_k, "K"), (w_q, "Q"), (w_v, "V")))
        scaled = (q @ k.swapaxes(-1, -2) + probes["A_w"]) / 2
        a_sig = jax.nn.softmax(jnp.where(mask[None], scaled, -jnp.inf), axis=-1) + probes["A_sig"]
        return (a_sig @ v * upstream).sum()

    shapes = {"K": (2, 5, 4), "Q": (2, 5, 4), "V": (2, 5, 3), "A_w": (2, 5, 5), "A_sig": (2, 5, 5)}
    expected = jax.grad(loss)({name: jnp.zeros(shape) for name, shape in shapes.items()})
    for name in shapes:
        assert_close(getattr(grads, f"dLd{name}"), expected[name], FLOAT64)


def test_the_derivative_by_hand_is_what_jax_uses():
    x, weight = normal(0, 5, 7), normal(1, 7, 7)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: self_attention(x, weight, weight, weight), (x,), (x,))
