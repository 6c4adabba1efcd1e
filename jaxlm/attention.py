"""Attention as a pure function: grouped queries, softmax in at least float32, masks from positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K Hv"],
    mask: Bool[Array, "#B T S"],
    keep: Float[Array, "B K G T S"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """softmax(Q K^T / sqrt(H)) V, query head n reading key/value head n // G; the type of `values` is kept.

    Args:
      mask: True where a query may see a key. A query that sees none gives zeros.
      keep: factors on the attention weights (dropout: 0 or 1/(1 - rate)).

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouping: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245. torch.nn.functional.scaled_dot_product_attention gives NaN, not zeros, for
    a query that sees nothing.
    """
    batch, length, heads, width = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, width)
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=wide)
    weights = masked_softmax(scores * width**-0.5, mask[:, None, None])
    if keep is not None:
        weights = weights * keep
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(values.dtype), values)
    return out.reshape(batch, length, heads, values.shape[-1])
