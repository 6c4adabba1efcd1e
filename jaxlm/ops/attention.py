"""Attention as pure functions: grouped queries, softmax in at least float32, masks from positions."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.ops.attention_scores import Score, dot_scores
from jaxlm.ops.matmul import wide_einsum


@jax.custom_vjp
def masked_softmax(scores: Float[Array, "*rows S"], mask: Bool[Array, "*#rows S"]) -> Float[Array, "*rows S"]:
    """Softmax over the last axis among the scores where `mask` is True; a row without any gives zeros.

    Reverse mode only. The backward pass takes its row sum as a product of vectors: XLA:CPU runs that five times
    as fast as the multiply-and-reduce that autodiff writes.
    """
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, weights, 0)


def _softmax_forward(scores, mask):
    weights = masked_softmax(scores, mask)
    return weights, weights


def _softmax_backward(weights, d_weights):
    row_sum = jnp.einsum("...s,...s->...", weights, d_weights)[..., None]
    return weights * (d_weights - row_sum), None


masked_softmax.defvjp(_softmax_forward, _softmax_backward)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Cap * tanh(x / cap): bounded by cap, almost x where x is small; None leaves x as it is.

    Source: Gemma 2, https://arxiv.org/abs/2408.00118, section 2.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K Hv"],
    mask: Bool[Array, "#B T seen"],
    *,
    past: tuple[Float[Array, "B C K H"], Float[Array, "B C K Hv"]] | None = None,
    score: Score = dot_scores,
    cap: float | None = None,
    on_weights: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T maps Hv"]:
    """softmax(scores) V, query head n reading key/value head n // G; the type of `values` is kept.

    Args:
      mask: True where a query may see a key, those of the past first. A query that sees none gives zeros.
      past: keys and values before these. Scores are joined, not keys: a cache is read where it lies.
      score: the score of a query and a key; one that adds up a group (`scores.summed`) leaves K maps instead of N.
      cap: soft cap of the scores.
      on_weights: what becomes of the attention weights [B, K, G, T, C + S] before they meet the values (dropout).

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouping: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245. torch.nn.functional.scaled_dot_product_attention gives NaN, not zeros, for
    a query that sees nothing.
    """
    batch, length, heads, width = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = score(grouped, keys)
    if past is not None:
        scores = jnp.concatenate([score(grouped, past[0]), scores], axis=-1)
    weights = masked_softmax(softcap(scores, cap), mask[:, None, None])
    if on_weights is not None:
        weights = on_weights(weights)
    weights = weights.astype(values.dtype)
    if past is None:
        out = _mix(weights, values)
    else:
        slots = past[1].shape[1]
        out = _mix(weights[..., :slots], past[1]) + _mix(weights[..., slots:], values)
    return out.reshape(batch, length, -1, values.shape[-1])


def _mix(weights: Float[Array, "B K G T S"], values: Float[Array, "B S K Hv"]) -> Float[Array, "B T K G Hv"]:
    if weights.shape[3] == 1:  # the order of `dot_scores`
        return jnp.einsum("bskh,bkgts->btkgh", values, weights)
    return jnp.einsum("bkgts,bskh->btkgh", weights, values)


def cudnn_attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Causal attention of whole sequences by `jax.nn.dot_product_attention`, cuDNN's fused kernel unless told.

    Rows are right-padded at most: padding comes after every real token, and what stands there is not defined.
    """
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


class SelfAttentionGrads(NamedTuple):
    """Derivatives of a loss L inside `self_attention`, in the order in which the backward pass meets them.

    A_w is Q K^T before scaling, A_sig its softmax after scaling and masking.
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
    """One attention head, softmax(Q K^T / sqrt(D_k)) V with K = X W_k, Q = X W_q, V = X W_v; derivative by hand.

    The softmax is in at least float32. The backward pass is `self_attention_grads`, not autodiff (reverse mode only).
    Any number of batch axes.

    Args:
      causal: token t sees tokens 0 .. t only.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1.
    """
    return _self_attention(X, W_k, W_q, W_v, causal)[0]


def self_attention_grads(
    X: Float[Array, "*batch T D"],
    W_k: Float[Array, "D Dk"],
    W_q: Float[Array, "D Dk"],
    W_v: Float[Array, "D Dv"],
    dLdXnew: Float[Array, "*batch T Dv"],
    causal: bool = False,
) -> SelfAttentionGrads:
    """The derivatives of a loss in every quantity inside `self_attention`, given that in its result."""
    return _self_attention_grads(_self_attention(X, W_k, W_q, W_v, causal)[1], dLdXnew)


def _self_attention(X, W_k, W_q, W_v, causal):
    K, Q, V = (jnp.matmul(X, weight) for weight in (W_k, W_q, W_v))
    wide = jnp.promote_types(X.dtype, jnp.float32)
    A_w = wide_einsum("...tk,...sk->...ts", Q, K, wide)
    mask = jnp.tri(X.shape[-2], dtype=bool) if causal else jnp.ones(A_w.shape[-2:], bool)
    mask = jnp.expand_dims(mask, range(A_w.ndim - 2))
    A_sig = masked_softmax(A_w * W_k.shape[1] ** -0.5, mask).astype(X.dtype)
    return jnp.matmul(A_sig, V), (X, W_k, W_q, W_v, K, Q, V, A_sig)


def _self_attention_grads(residuals, dLdXnew):
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


def _self_attention_backward(causal, residuals, dLdXnew):
    grads = _self_attention_grads(residuals, dLdXnew)
    return grads.dLdX, grads.dLdWk, grads.dLdWq, grads.dLdWv


self_attention.defvjp(_self_attention, _self_attention_backward)
