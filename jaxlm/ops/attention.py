"""Attention as pure functions: grouped queries, softmax in at least float32, masks from positions."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.ops.attention_scores import Score, dot_scores


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
