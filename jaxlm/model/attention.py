"""Self-attention of one layer: projections, positions, cache, and which function attends."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from jaxlm.model.cache import LAYER_CACHE_NAMES, KeyValues, LayerCache, new_layer_cache
from jaxlm.model.layers import Dense, Norm, split, weight_init
from jaxlm.ops.attention import WeightDropout, attend, cudnn_attend
from jaxlm.ops.attention_scores import Score, additive_scores, concat_scores, dot_scores, multiplicative_scores, summed
from jaxlm.ops.blocked_attention import BATCHED_FROM_TOKENS, BATCHED_FROM_WINDOWS, blocked_attend
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.partition import constrain, locally, mesh_shape
from jaxlm.ops.positions import RopeScaling, apply_rope, rope_angles

SCORES: dict[str, Callable[..., Array]] = {
    "dot": dot_scores,
    "multiplicative": multiplicative_scores,
    "concat": concat_scores,
    "additive": additive_scores,
}

Implementation = Literal["cudnn", "local", "reference"]


class Inputs(NamedTuple):
    """What attention computes from. On a mesh each device has its own rows and heads of all of it."""

    queries: Float[Array, "B T N H"]
    new: KeyValues
    """Keys and values of the same tokens."""
    positions: Int[Array, "#B T"]
    weights: dict[str, Float[Array, "N ..."]]
    """The parameters of the score."""
    past: LayerCache | None
    first: Int[Array, "B T"] | None
    """The first position that each token may see, without a cache; None = 0."""
    dropout_key: Array | None
    lines: Int[Array, "B T N"] | None
    """The numbers by which dropout draws (`WeightDropout`)."""

    def names(self) -> Any:
        """The logical axes of each array, in the same structure."""
        of_keys, of_tokens = ("batch", None, "kv_heads", None), ("batch", None)
        make: Any = type(self)
        named = make(
            queries=("batch", None, "heads", None),
            new=KeyValues._make([of_keys, of_keys, of_tokens]),
            positions=of_tokens,
            weights={name: ("heads", *[None] * (weight.ndim - 1)) for name, weight in self.weights.items()},
            past=LAYER_CACHE_NAMES,
            first=of_tokens,
            dropout_key=(None,),
            lines=("batch", None, "heads"),
        )
        return make(*(None if own is None else name for own, name in zip(self, named, strict=True)))


class Attention(nn.Module):
    """Self-attention of one layer: projections, positions, cache, output projection."""

    cfg: ModelConfig
    layer: LayerSettings

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        cache: LayerCache | int | None,
        train: bool,
        first: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends from x to the cache and to x itself. Returns the cache with the keys and values of x written.

        Args:
          cache: a number = none so far, and one of so many slots comes back.
          first: the first position that each token may see, without a cache; None = 0.
        """
        cfg = self.cfg
        queries, new = self._project(x, positions)
        past, slots = (cache, None) if isinstance(cache, LayerCache) else (None, cache)
        key, lines = None, None
        if train and cfg.attention_dropout:
            dropout = WeightDropout(cfg.attention_dropout, self.make_rng("dropout")).numbered(*queries.shape[:3])
            key, lines = jax.random.key_data(dropout.key), dropout.lines
        inputs = Inputs(queries, new, positions, self._score_weights(), past, first, key, lines)
        attended = functools.partial(attend_seen, cfg, self.layer, slots, train)
        if mesh_shape():
            results = ("batch", None, "heads", None), None if cache is None else LAYER_CACHE_NAMES
            out, new_cache = locally(attended, (inputs.names(),), results)(inputs)
        else:
            sow = functools.partial(self.sow, "intermediates", "attention_weights")  # does nothing unless asked for
            out, new_cache = attended(inputs, sow)
        out = rearrange(out, "b t maps h -> b t (maps h)")
        if cfg.attention_out_proj:
            bias = cfg.use_bias if cfg.attention_out_bias is None else cfg.attention_out_bias
            out = Dense(cfg, cfg.embed_dim, bias, ("heads", "embed"), to_residual=True, name="out")(out)
        return constrain(out, "batch", None, None), new_cache

    @nn.nowrap
    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T N H"], KeyValues]:
        """Queries, and the keys and values of the same tokens, rotated to their positions where RoPE is used."""
        cfg, sizes = self.cfg, self.cfg.resolved
        bias = cfg.use_bias if cfg.qkv_bias is None else cfg.qkv_bias

        def heads(name: str, axis: str, count: int, width: int) -> Float[Array, "B T heads width"]:
            projected = Dense(cfg, count * width, bias, ("embed", axis), name=name)(x)
            return rearrange(projected, "b t (heads width) -> b t heads width", heads=count)

        def shared(name: str, width: int) -> Float[Array, "B T K width"]:
            if cfg.kv_sharing != "mean_pooled":
                return heads(name, "kv_heads", sizes.num_kv_heads, width)
            full = heads(name, "heads", cfg.num_heads, width)
            return rearrange(full, "b t (kv group) width -> b t kv group width", kv=sizes.num_kv_heads).mean(axis=3)

        queries, keys = heads("query", "heads", cfg.num_heads, sizes.head_dim), shared("key", sizes.head_dim)
        values = shared("value", sizes.value_head_dim)
        if cfg.qk_norm:
            queries, keys = self._normalised(queries, "query_norm"), self._normalised(keys, "key_norm")
        if cfg.position == "rope":
            scaling, magnitude = rope_scaling(cfg, self.layer)
            wide = jnp.promote_types(cfg.dtype, jnp.float32)
            angles = rope_angles(positions, cfg.rotary_dim or sizes.head_dim, self.layer.rope_theta, wide, scaling)
            queries, keys = (apply_rope(a, angles, cfg.rope_layout, magnitude) for a in (queries, keys))
        return queries, KeyValues(keys, values, positions)

    @nn.nowrap
    def _normalised(self, x: Float[Array, "B T heads H"], name: str) -> Float[Array, "B T heads H"]:
        norm = Norm(self.cfg, "rmsnorm", name=name)
        if self.cfg.qk_norm_over == "head":
            return norm(x)
        return norm(rearrange(x, "b t heads width -> b t (heads width)")).reshape(x.shape)

    @nn.nowrap
    def _score_weights(self) -> dict[str, Float[Array, "N ..."]]:
        """The parameters of the configured score, one set for each query head."""
        cfg, width = self.cfg, self.cfg.resolved.head_dim
        hidden = cfg.score_dim or width
        # the features that each sums over, and its shape for one head
        shapes: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
            "dot": {},
            "multiplicative": {"weight": (width, (width, width))},
            "concat": {"key": (2 * width, (width,)), "query": (2 * width, (width,))},
            "additive": {
                "key": (2 * width, (width, hidden)),
                "query": (2 * width, (width, hidden)),
                "out": (hidden, (hidden,)),
            },
        }
        weights = {}
        for name, (fan_in, shape) in shapes[cfg.attention_score].items():
            init = split(weight_init(cfg, fan_in), "heads", *[None] * len(shape))
            weight = self.param(f"score_{name}", init, (cfg.num_heads, *shape), jnp.dtype(cfg.param_dtype))
            weights[name if name == "weight" else f"{name}_weight"] = weight.astype(cfg.dtype)
        return weights


def attend_seen(
    cfg: ModelConfig,
    layer: LayerSettings,
    slots: int | None,
    train: bool,
    inputs: Inputs,
    on_weights: Callable[[Array], object] | None = None,
) -> tuple[Float[Array, "B T maps Hv"], LayerCache | None]:
    """What the queries read from the cache and from their own tokens, and the cache with these written.

    All sizes are those of the arrays: on a mesh they are a part of the batch and of the heads.

    Args:
      slots: of a new cache, where there is none so far; None = no cache.
    """
    queries, new, positions, weights, past, first, key, lines = inputs
    batch, length = queries.shape[:2]
    window = layer.window if past is None else past.slots  # slots: min(W, capacity)
    if slots is not None:
        window = slots if slots < length else None
    implementation = choose(cfg, length, window, cached=past is not None)
    seen: tuple[KeyValues, ...] = (new,)
    new_cache = None
    if past is not None:
        seen, new_cache = past.extend(new, in_order=implementation == "local")
    elif slots is not None:
        placed = new._replace(positions=jnp.broadcast_to(new.positions, (batch, length)))
        new_cache = new_layer_cache(cfg, batch, slots, new.keys.shape[2]).write(*placed)
    if implementation == "cudnn":
        return cudnn_attend(queries, new.keys, new.values, window, scale=cfg.attention_scale), new_cache
    options: dict[str, Any] = {"score": _score(cfg, weights), "cap": cfg.attention_softcap}
    if key is not None:
        options["dropout"] = WeightDropout(cfg.attention_dropout, jax.random.wrap_key_data(key), lines)
    if implementation == "local":
        joined = _joined(seen)
        at = positions, joined.positions, window
        options |= {"batched": True if cfg.attention_impl == "local" and window else None, "train": train}
        return blocked_attend(queries, joined.keys, joined.values, *at, first=first, **options), new_cache
    key_positions = jnp.concatenate([part.positions for part in seen], axis=1)
    mask = attention_mask(positions, key_positions, window, first)
    before, own = (seen[0].keys, seen[0].values) if len(seen) > 1 else None, seen[-1]
    return attend(queries, own.keys, own.values, mask, past=before, on_weights=on_weights, **options), new_cache


def choose(cfg: ModelConfig, length: int, window: int | None, cached: bool) -> Implementation:
    """Which function computes the attention of `length` queries under this window."""
    asked = cfg.attention_impl
    if asked == "cudnn" and not cached and length > 1:
        return "cudnn"
    if asked == "reference" or length == 1:
        return "reference"
    if not cached:
        return "local"
    # Blocks need the cached keys in order and in one array. That pays if there are many.
    assert window is not None
    many = length >= max(BATCHED_FROM_WINDOWS * window, BATCHED_FROM_TOKENS)
    return "local" if asked == "local" or many else "reference"


def _score(cfg: ModelConfig, weights: dict[str, Float[Array, "N ..."]]) -> Score:
    """The configured score with its parameters."""
    group = cfg.num_heads // cfg.resolved.num_kv_heads
    options: dict[str, Any] = {name: leaf.reshape(-1, group, *leaf.shape[1:]) for name, leaf in weights.items()}
    if cfg.attention_score in ("dot", "multiplicative"):
        options["scale"] = cfg.attention_scale
    score: Score = functools.partial(SCORES[cfg.attention_score], **options)
    return summed(score) if cfg.kv_sharing == "summed_scores" else score


def _joined(parts: tuple[KeyValues, ...]) -> KeyValues:
    """The parts one after another."""
    if len(parts) == 1:
        return parts[0]
    rows = [part._replace(positions=jnp.broadcast_to(part.positions, part.keys.shape[:2])) for part in parts]
    return KeyValues(*(jnp.concatenate(leaves, axis=1) for leaves in zip(*rows, strict=True)))


def rope_scaling(cfg: ModelConfig, layer: LayerSettings) -> tuple[RopeScaling | None, float]:
    """How a layer's RoPE frequencies are scaled, and the factor of the rotated features."""
    if cfg.rope_scaling == "none" or layer.rope_factor == 1:
        return None, 1.0
    ramp = cfg.rope_ramp or ((1.0, 32.0) if cfg.rope_scaling == "yarn" else (1.0, 4.0))
    scaling = RopeScaling(cfg.rope_scaling, layer.rope_factor, cfg.rope_original_len or cfg.max_seq_len, ramp)
    if cfg.rope_scaling != "yarn":
        return scaling, 1.0
    usual = 1 + 0.1 * math.log(max(layer.rope_factor, 1))
    return scaling, usual if cfg.rope_attention_factor is None else cfg.rope_attention_factor
