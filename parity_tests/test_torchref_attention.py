"""`torchref.Attention`: its value against torch's and its derivatives against autograd's, in float64."""

import pytest
import torch
from tolerances import FLOAT64, assert_close
from torch.nn import functional

from jaxlm.convert.tensors import to_array
from torchref import Attention

DERIVATIVES = {
    "dLdA_sig": "A_sig",
    "dLdA_w": "A_w",
    "dLdK": "K",
    "dLdQ": "Q",
    "dLdV": "V",
    "dLdWk": "W_k",
    "dLdWq": "W_q",
    "dLdWv": "W_v",
}
"""The derivatives, and the tensor each is taken in."""


def problem(*batch):
    """X, W_k, W_q, W_v and the derivative of the loss in the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = (*batch, 5, 7), (7, 4), (7, 4), (7, 3), (*batch, 5, 3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_attention_and_every_derivative_are_autograds(batch, causal):
    X, W_k, W_q, W_v, upstream = problem(*batch)
    head = Attention(W_k, W_q, W_v, causal=causal)
    result = head.forward(X)
    dLdX = head.backward(upstream)

    leaves = {"X": X, "W_k": W_k, "W_q": W_q, "W_v": W_v}
    X, W_k, W_q, W_v = (leaf.clone().requires_grad_() for leaf in leaves.values())
    K, Q, V = X @ W_k, X @ W_q, X @ W_v
    expected = functional.scaled_dot_product_attention(Q, K, V, is_causal=causal)
    assert_close(result, expected.detach(), FLOAT64)
    A_w = Q @ K.mT
    hidden = torch.ones(5, 5).triu(1).bool() if causal else torch.zeros(5, 5).bool()
    A_sig = functional.softmax((A_w / 2).masked_fill(hidden, -torch.inf), dim=-1)
    graph = {"W_k": W_k, "W_q": W_q, "W_v": W_v, "K": K, "Q": Q, "V": V, "A_w": A_w, "A_sig": A_sig}
    for name in ("K", "Q", "V", "A_w", "A_sig"):
        assert_close(getattr(head, name), graph[name].detach(), FLOAT64)
        graph[name].retain_grad()
    (A_sig @ V * upstream).sum().backward()
    assert_close(dLdX, X.grad, FLOAT64)
    for derivative, name in DERIVATIVES.items():
        assert_close(getattr(head, derivative), graph[name].grad, FLOAT64)


def test_attention_takes_arrays_and_a_new_call_replaces_the_old():
    X, W_k, W_q, W_v, upstream = problem(2)
    head = Attention(*map(to_array, (W_k, W_q, W_v)), causal=True)
    head.forward(to_array(X) + 1)
    head.backward(to_array(upstream))
    stale = head.dLdWk
    result, dLdX = head.forward(to_array(X)), head.backward(to_array(upstream))
    fresh = Attention(W_k, W_q, W_v, causal=True)
    assert_close(result, fresh.forward(X), FLOAT64)
    assert_close(dLdX, fresh.backward(upstream), FLOAT64)
    assert_close(head.dLdWk, fresh.dLdWk, FLOAT64)
    assert (stale - fresh.dLdWk).abs().max() > 0.1
