"""Attention as pure functions: grouped queries, softmax in at least float32, boolean masks."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxlm.ops.attention_scores import Score, dot_scores
from jaxlm.ops.dropout import draw_kept
from jaxlm.ops.matmul import transposed_product, wide_einsum


class WeightDropout(NamedTuple):
    """Attention weights are zeroed with probability `rate`, the others divided by 1 - rate."""

    rate: float
    key: PRNGKeyArray
    lines: Int[Array, "B T N"] | None = None
    """A number for each query, from which its weights are drawn: so they do not depend on the blocks or the devices in
    which the queries are computed. None = numbered where they are used."""

    def numbered(self, batch: int, length: int, heads: int) -> "WeightDropout":
        """With the numbers of a whole array of queries."""
        return self._replace(lines=jnp.arange(batch * length * heads, dtype=jnp.int32).reshape(batch, length, heads))


def masked_softmax(scores: Float[Array, "*rows S"], mask: Bool[Array, "*#rows S"]) -> Float[Array, "*rows S"]:
    """Softmax over the last axis among the scores where `mask` is True; a row that is all False gives zeros."""
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, weights, 0)


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
    dropout: WeightDropout | None = None,
    on_weights: Callable[[Array], object] | None = None,
) -> Float[Array, "B T maps Hv"]:
    """softmax(scores) V, where query head n reads key/value head n // G. The result has the type of `values`.

    Reverse mode only.

    Args:
      mask: True where a query may see a key; the keys of the past come first. A query that sees no key gives zeros.
      past: keys and values that precede these. Their scores are concatenated, not the keys, so that a cache is not
        copied.
      score: the score of a query and a key; one that sums over a group (`attention_scores.summed`) leaves K maps.
      cap: soft cap of the scores.
      dropout: of the weights.
      on_weights: called with the weights [B, K, maps, T, C + S] before dropout, without a gradient.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouping: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245. torch.nn.functional.scaled_dot_product_attention gives NaN, not zeros, for
    a query that sees nothing.
    """
    parts = [(keys, values)] if past is None else [past, (keys, values)]
    grouped = _grouped(queries, keys)
    scores = [score(grouped, _heads_first(part)) for part, _ in parts]
    capped = softcap(scores[0] if past is None else jnp.concatenate(scores, axis=-1), cap)
    kept = None if dropout is None else _draw_kept(dropout, capped.shape)
    rate = 0.0 if dropout is None else dropout.rate
    out, weights = _read(rate, capped, mask[:, None, None], tuple(_heads_first(part) for _, part in parts), kept)
    if on_weights is not None:
        on_weights(jax.lax.stop_gradient(weights))
    return rearrange(out.astype(values.dtype), "b kv maps t width -> b t (kv maps) width")


def _draw_kept(dropout: WeightDropout, shape: tuple[int, ...]) -> Bool[Array, "B K maps T seen"]:
    batch, kv, maps, length, _ = shape
    lines = dropout.numbered(batch, length, kv * maps).lines if dropout.lines is None else dropout.lines
    assert lines is not None
    lines = rearrange(lines, "b t (kv group) -> b kv group t", kv=kv)
    return draw_kept(dropout.key, dropout.rate, shape, lines[:, :, :maps])


def _grouped(queries: Float[Array, "B T N H"], keys: Float[Array, "B S K H"]) -> Float[Array, "B K G T H"]:
    return rearrange(queries, "b t (kv group) width -> b kv group t width", kv=keys.shape[2])


def _heads_first(x: Float[Array, "B S K H"]) -> Float[Array, "B K S H"]:
    return x.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(
    rate: float,
    scores: Float[Array, "B K maps T seen"],
    mask: Bool[Array, "#B 1 1 T seen"],
    values: tuple[Float[Array, "B K _ Hv"], ...],
    kept: Bool[Array, "B K maps T seen"] | None,
) -> tuple[Float[Array, "B K maps T Hv"], Float[Array, "B K maps T seen"]]:
    """softmax(scores) V in at least float32, the values in one or more parts, and the weights without a gradient."""
    return _read_forward(rate, scores, mask, values, kept)[0]


def _read_forward(rate, scores, mask, values, kept):
    weights = masked_softmax(scores, mask)
    parts = _split(_dropped(weights, kept, rate), values)
    out = sum(_mix(part, own) for part, own in zip(parts, values, strict=True))
    return (out, weights), (weights, values, kept, out)


def _read_backward(rate, residuals, d_results):
    """The derivative of softmax needs sum_s weight_s d_weight_s, which is out . d_out: a sum over Hv, not over S.

    d_out comes from a result in the type of the values, so it loses nothing in that type.
    """
    (weights, values, kept, out), (d_out, _) = residuals, d_results
    row_sum = jnp.sum(out * d_out, axis=-1, keepdims=True)
    wide = d_out.dtype
    d_parts = [wide_einsum("bkgth,bksh->bkgts", d_out.astype(part.dtype), part, wide) for part in values]
    d_weights = _dropped(d_parts[0] if len(values) == 1 else jnp.concatenate(d_parts, axis=-1), kept, rate)
    d_values = tuple(
        transposed_product(_rows(part.astype(own.dtype)), _rows(d_out.astype(own.dtype)), wide).astype(own.dtype)
        for part, own in zip(_split(_dropped(weights, kept, rate), values), values, strict=True)
    )
    return weights * (d_weights - row_sum), None, d_values, None


_read.defvjp(_read_forward, _read_backward)


def _dropped(weights: Array, kept: Array | None, rate: float) -> Array:
    return weights if kept is None else jnp.where(kept, weights / (1 - rate), 0)


def _split(weights: Float[Array, "B K maps T seen"], values: tuple[Array, ...]) -> list[Array]:
    """The weights of each part of the values."""
    sizes = [part.shape[2] for part in values]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [weights[..., start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _mix(weights: Float[Array, "B K maps T S"], values: Float[Array, "B K S Hv"]) -> Float[Array, "B K maps T Hv"]:
    wide = weights.dtype
    if weights.shape[3] == 1:  # the order of `dot_scores`
        return wide_einsum("bksh,bkgts->bkgth", values, weights.astype(values.dtype), wide)
    return wide_einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, wide)


def _rows(x: Float[Array, "B K maps T width"]) -> Float[Array, "B K rows width"]:
    return rearrange(x, "b kv maps t width -> b kv (maps t) width")


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
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of whole sequences by `jax.nn.dot_product_attention`, by default cuDNN's fused kernel.

    Rows may be padded on the right only. The result at padding is undefined.
    """
    length = queries.shape[1]
    if length % 2:  # JAX refuses the gradient of odd lengths. No query sees the key behind the last.
        queries, keys, values = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out[:, :length]
