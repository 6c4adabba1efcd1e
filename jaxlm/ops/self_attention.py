"""One attention head whose derivative is written by hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention import masked_softmax
from jaxlm.ops.matmul import wide_einsum


class SelfAttentionValues(NamedTuple):
    """What `self_attention` computes, in this order.

    A_w is Q K^T before scaling, in at least float32; A_sig its softmax after scaling and masking; Xnew the result.
    """

    K: Float[Array, "*batch T Dk"]
    Q: Float[Array, "*batch T Dk"]
    V: Float[Array, "*batch T Dv"]
    A_w: Float[Array, "*batch T T"]
    A_sig: Float[Array, "*batch T T"]
    Xnew: Float[Array, "*batch T Dv"]


class SelfAttentionGrads(NamedTuple):
    """Derivatives of a loss L in the quantities of `SelfAttentionValues`, the weights and X, in the order in which the
    backward pass computes them.
    """

    dLdA_sig: Float[Array, "*batch T T"]
    dLdA_w: Float[Array, "*batch T T"]
    dLdK: Float[Array, "*batch T Dk"]
    dLdQ: Float[Array, "*batch T Dk"]
    dLdV: Float[Array, "*batch T Dv"]
    dLdWk: Float[Array, "D Dk"]
    dLdWq: Float[Array, "D Dk"]
    dLdWv: Float[Array, "D Dv"]
    dLdX: Float[Array, "*batch T D"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def self_attention(
    X: Float[Array, "*batch T D"],
    W_k: Float[Array, "D Dk"],
    W_q: Float[Array, "D Dk"],
    W_v: Float[Array, "D Dv"],
    causal: bool = False,
) -> Float[Array, "*batch T Dv"]:
    """One attention head, softmax(Q K^T / sqrt(D_k)) V, with K = X W_k, Q = X W_q, V = X W_v.

    The softmax is in at least float32. The backward pass is written by hand (`self_attention_grads`), not by autodiff;
    reverse mode only. X may have any number of batch axes.

    Args:
      causal: token t sees tokens 0 .. t only.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1.
    """
    return self_attention_values(X, W_k, W_q, W_v, causal).Xnew


def self_attention_values(
    X: Float[Array, "*batch T D"],
    W_k: Float[Array, "D Dk"],
    W_q: Float[Array, "D Dk"],
    W_v: Float[Array, "D Dv"],
    causal: bool = False,
) -> SelfAttentionValues:
    """Every quantity inside `self_attention`, by name."""
    K, Q, V = (jnp.matmul(X, weight) for weight in (W_k, W_q, W_v))
    wide = jnp.promote_types(X.dtype, jnp.float32)
    A_w = wide_einsum("...tk,...sk->...ts", Q, K, wide)
    mask = jnp.tri(X.shape[-2], dtype=bool) if causal else jnp.ones(A_w.shape[-2:], bool)
    mask = jnp.expand_dims(mask, range(A_w.ndim - 2))
    A_sig = masked_softmax(A_w * W_k.shape[1] ** -0.5, mask).astype(X.dtype)
    return SelfAttentionValues(K, Q, V, A_w, A_sig, jnp.matmul(A_sig, V))


def self_attention_grads(
    X: Float[Array, "*batch T D"],
    W_k: Float[Array, "D Dk"],
    W_q: Float[Array, "D Dk"],
    W_v: Float[Array, "D Dv"],
    dLdXnew: Float[Array, "*batch T Dv"],
    causal: bool = False,
) -> SelfAttentionGrads:
    """The derivatives of a loss with respect to every quantity inside `self_attention`, given that of its result."""
    values = self_attention_values(X, W_k, W_q, W_v, causal)
    return _grads((X, W_k, W_q, W_v, *values[:3], values.A_sig), dLdXnew)


def _forward(X, W_k, W_q, W_v, causal):
    values = self_attention_values(X, W_k, W_q, W_v, causal)
    return values.Xnew, (X, W_k, W_q, W_v, *values[:3], values.A_sig)


def _grads(residuals, dLdXnew):
    X, W_k, W_q, W_v, K, Q, V, A_sig = residuals
    dLdA_sig = jnp.einsum("...tv,...sv->...ts", dLdXnew, V)
    dLdV = jnp.einsum("...ts,...tv->...sv", A_sig, dLdXnew)
    row_sum = jnp.einsum("...ts,...ts->...t", dLdA_sig, A_sig)[..., None]
    dLdA_w = A_sig * (dLdA_sig - row_sum) * W_k.shape[1] ** -0.5
    dLdQ = jnp.matmul(dLdA_w, K)
    dLdK = jnp.einsum("...ts,...tk->...sk", dLdA_w, Q)
    dLdWk, dLdWq, dLdWv = (jnp.einsum("...td,...tk->dk", X, d) for d in (dLdK, dLdQ, dLdV))
    dLdX = jnp.matmul(dLdK, W_k.T) + jnp.matmul(dLdQ, W_q.T) + jnp.matmul(dLdV, W_v.T)
    return SelfAttentionGrads(dLdA_sig, dLdA_w, dLdK, dLdQ, dLdV, dLdWk, dLdWq, dLdWv, dLdX)


def _backward(causal, residuals, dLdXnew):
    grads = _grads(residuals, dLdXnew)
    return grads.dLdX, grads.dLdWk, grads.dLdWq, grads.dLdWv


self_attention.defvjp(_forward, _backward)
