"""Attention as pure functions: grouped queries, softmax in at least float32, boolean masks."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from jaxlm.ops.attention_scores import Score, dot_scores


@jax.custom_vjp
def masked_softmax(scores: Float[Array, "*rows S"], mask: Bool[Array, "*#rows S"]) -> Float[Array, "*rows S"]:
    """Softmax over the last axis among the scores where `mask` is True; a row that is all False gives zeros.

    Reverse mode only. The backward pass computes its row sum as a product of vectors: XLA:CPU runs that five times
    as fast as the multiply-and-reduce that autodiff produces.
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
    """Cap * tanh(x / cap): bounded by cap, and almost x where x is small. None leaves x unchanged.

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
    """softmax(scores) V, where query head n reads key/value head n // G. The result has the type of `values`.

    Args:
      mask: True where a query may see a key; the keys of the past come first. A query that sees no key gives zeros.
      past: keys and values that precede these. Their scores are concatenated, not the keys, so that a cache is not
        copied.
      score: the score of a query and a key; one that sums over a group (`attention_scores.summed`) leaves K maps.
      cap: soft cap of the scores.
      on_weights: applied to the attention weights [B, K, G, T, C + S] before they multiply the values (dropout).

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouping: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245. torch.nn.functional.scaled_dot_product_attention gives NaN, not zeros, for
    a query that sees nothing.
    """
    grouped = rearrange(queries, "b t (kv group) width -> b t kv group width", kv=keys.shape[2])
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
    return rearrange(out, "b t kv group width -> b t (kv group) width")


def _mix(weights: Float[Array, "B K G T S"], values: Float[Array, "B S K Hv"]) -> Float[Array, "B T K G Hv"]:
    if weights.shape[3] == 1:  # the order of `dot_scores`
        return jnp.einsum("bskh,bkgts->btkgh", values, weights)
    return jnp.einsum("bkgts,bskh->btkgh", weights, values)


def cudnn_available() -> bool:
    """Whether JAX computes on an NVIDIA GPU that has cuDNN's fused attention: of compute capability 8.0 or more."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return False
    return tuple(map(int, device.compute_capability.split("."))) >= (8, 0)


def cudnn_attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Causal attention of whole sequences by `jax.nn.dot_product_attention`, by default cuDNN's fused kernel.

    Rows may be padded on the right only. The result at padding is undefined.
    """
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
