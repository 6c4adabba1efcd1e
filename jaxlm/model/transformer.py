"""The decoder-only transformer: attention, MLP, blocks."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from jaxlm.model.cache import KeyValues, KVCache, LayerCache, checked_past, layer_slots, new_layer_cache
from jaxlm.model.layer_stack import apply_layers
from jaxlm.model.layers import Dense, Dropout, LanguageModel, Norm, table_init, weight_init
from jaxlm.ops import wide_gradients
from jaxlm.ops.attention import WeightDropout, attend, cudnn_attend
from jaxlm.ops.attention_scores import Score, additive_scores, concat_scores, dot_scores, multiplicative_scores, summed
from jaxlm.ops.blocked_attention import BATCHED_FROM_TOKENS, BATCHED_FROM_WINDOWS, blocked_attend
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.positions import RopeScaling, apply_rope, rope_angles, sinusoids
from jaxlm.types import Logits, Tokens


def _gelu(x: Array) -> Array:
    """GELU by PyTorch's formula, in at least float32.

    The erfc in jax.nn.gelu is more precise far below zero, where the result is almost zero, but slower: a decoding step
    of 32 rows took 1.09 times as long.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": _gelu,
    "geglu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
GATED = ("swiglu", "geglu", "geglu_tanh")

Implementation = Literal["cudnn", "local", "reference"]


class Attention(nn.Module):
    """Self-attention of one layer: projections, positions, cache, output projection."""

    cfg: ModelConfig
    layer: LayerSettings

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], cache: LayerCache | int | None, train: bool
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends from x to the cache and to x itself. Returns the cache with the keys and values of x written.

        Args:
          cache: a number = none so far, and one of so many slots comes back.
        """
        cfg = self.cfg
        queries, new = self._project(x, positions)
        length = x.shape[1]
        window = cache.slots if isinstance(cache, LayerCache) else self.layer.window  # slots: min(W, capacity)
        if isinstance(cache, int):
            window = cache if cache < length else None
        implementation = self._implementation(length, window, cached=isinstance(cache, LayerCache))
        seen: tuple[KeyValues, ...] = (new,)
        new_cache = None
        if isinstance(cache, LayerCache):
            seen, new_cache = cache.extend(new, in_order=implementation == "local")
        elif cache is not None:
            placed = new._replace(positions=jnp.broadcast_to(new.positions, x.shape[:2]))
            new_cache = new_layer_cache(cfg, len(x), cache).write(*placed)
        out = self._attend(queries, positions, seen, window, implementation, train)
        out = rearrange(out, "b t maps h -> b t (maps h)")
        if cfg.attention_out_proj:
            bias = cfg.use_bias if cfg.attention_out_bias is None else cfg.attention_out_bias
            out = Dense(cfg, cfg.embed_dim, bias, to_residual=True, name="out")(out)
        return out, new_cache

    @nn.nowrap
    def _attend(
        self,
        queries: Float[Array, "B T N H"],
        positions: Int[Array, "#B T"],
        seen: tuple[KeyValues, ...],
        window: int | None,
        implementation: Implementation,
        train: bool,
    ) -> Float[Array, "B T maps Hv"]:
        """What the queries read from one or two parts of keys and values, the tokens' own part last."""
        cfg, own = self.cfg, seen[-1]
        if implementation == "cudnn":
            return cudnn_attend(queries, own.keys, own.values, window, scale=cfg.attention_scale)
        dropout = None
        if train and cfg.attention_dropout:
            dropout = WeightDropout(cfg.attention_dropout, self.make_rng("dropout"))
        options: dict[str, Any] = {"score": self._score(), "cap": cfg.attention_softcap}
        if implementation == "local":
            joined = _joined(seen)
            at = positions, joined.positions, window
            options |= {"batched": True if cfg.attention_impl == "local" and window else None, "dropout": dropout}
            return blocked_attend(queries, joined.keys, joined.values, *at, train=train, **options)
        key_positions = jnp.concatenate([part.positions for part in seen], axis=1)
        mask = attention_mask(positions, key_positions, window)
        past = (seen[0].keys, seen[0].values) if len(seen) > 1 else None
        sow = functools.partial(self.sow, "intermediates", "attention_weights")  # does nothing unless asked for
        return attend(queries, own.keys, own.values, mask, past=past, **options, dropout=dropout, on_weights=sow)

    @nn.nowrap
    def _implementation(self, length: int, window: int | None, cached: bool) -> Implementation:
        """Which function computes the attention of `length` queries under this window."""
        asked = self.cfg.attention_impl
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

    @nn.nowrap
    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T N H"], KeyValues]:
        """Queries, and the keys and values of the same tokens, rotated to their positions where RoPE is used."""
        cfg, sizes = self.cfg, self.cfg.resolved
        bias = cfg.use_bias if cfg.qkv_bias is None else cfg.qkv_bias

        def heads(name: str, count: int, width: int) -> Float[Array, "B T heads width"]:
            projected = Dense(cfg, count * width, bias, name=name)(x)
            return rearrange(projected, "b t (heads width) -> b t heads width", heads=count)

        def shared(name: str, width: int) -> Float[Array, "B T K width"]:
            if cfg.kv_sharing != "mean_pooled":
                return heads(name, sizes.num_kv_heads, width)
            full = heads(name, cfg.num_heads, width)
            return rearrange(full, "b t (kv group) width -> b t kv group width", kv=sizes.num_kv_heads).mean(axis=3)

        queries, keys = heads("query", cfg.num_heads, sizes.head_dim), shared("key", sizes.head_dim)
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
    def _score(self) -> Score:
        """The configured score with its parameters, one set for each query head."""
        cfg, sizes = self.cfg, self.cfg.resolved
        width, hidden = sizes.head_dim, cfg.score_dim or sizes.head_dim

        def weight(name: str, fan_in: int, *shape: int) -> Float[Array, "K G ..."]:
            init = weight_init(cfg, fan_in)
            weights = self.param(f"score_{name}", init, (cfg.num_heads, *shape), jnp.dtype(cfg.param_dtype))
            return weights.astype(cfg.dtype).reshape(sizes.num_kv_heads, -1, *shape)

        score: Score = functools.partial(dot_scores, scale=cfg.attention_scale)
        if cfg.attention_score == "multiplicative":
            own = weight("weight", width, width, width)
            score = functools.partial(multiplicative_scores, weight=own, scale=cfg.attention_scale)
        elif cfg.attention_score == "concat":
            halves = {f"{name}_weight": weight(name, 2 * width, width) for name in ("key", "query")}
            score = functools.partial(concat_scores, **halves)
        elif cfg.attention_score == "additive":
            halves = {f"{name}_weight": weight(name, 2 * width, width, hidden) for name in ("key", "query")}
            score = functools.partial(additive_scores, **halves, out_weight=weight("out", hidden, hidden))
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


class MLP(nn.Module):
    """Feed-forward sublayer. Gated activations multiply the activation by a second projection."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transforms each token separately."""
        cfg = self.cfg
        hidden = ACTIVATIONS[cfg.activation](
            Dense(cfg, cfg.resolved.mlp_dim, cfg.use_bias, name="gate" if cfg.activation in GATED else "up")(x)
        )
        if cfg.activation in GATED:
            hidden *= Dense(cfg, cfg.resolved.mlp_dim, cfg.use_bias, name="up")(x)
        return Dense(cfg, cfg.embed_dim, cfg.use_bias, to_residual=True, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP, each with norm, dropout and residual connection."""

    cfg: ModelConfig
    layer: LayerSettings

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], cache: LayerCache | int | None, train: bool
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """One layer; the cache goes in and comes out."""
        cfg, order = self.cfg, self.cfg.norm_order
        new_cache = None

        def attention(y: Array) -> Array:
            nonlocal new_cache
            out, new_cache = Attention(cfg, self.layer, name="attention")(y, positions, cache, train)
            return out

        def changed(function: Callable[[Array], Array], y: Array, name: str) -> Array:
            out = function(y)
            if order in ("reordered", "sandwich"):
                out = Norm(cfg, name=f"{name}_post_norm" if order == "sandwich" else f"{name}_norm")(out)
            out = Dropout(cfg.dropout)(out, train)
            return out if cfg.residual_scale == 1 else out * jnp.asarray(cfg.residual_scale, out.dtype)

        def sublayer(x: Array, function: Callable[[Array], Array], name: str) -> Array:
            y = Norm(cfg, name=f"{name}_norm")(x) if order in ("pre", "sandwich") else x
            out = changed(function, y, name)
            out = x + out if cfg.residual else out
            return Norm(cfg, name=f"{name}_norm")(out) if order == "post" else out

        if cfg.block_layout == "sequential":
            x = sublayer(x, attention, "attention")
            if cfg.resolved.mlp_dim:
                x = sublayer(x, MLP(cfg, name="mlp"), "mlp")
            return x, new_cache
        y = Norm(cfg, name="attention_norm")(x)
        of_attention = changed(attention, y, "attention")
        if cfg.block_layout == "parallel":
            y = Norm(cfg, name="mlp_norm")(x)
        return x + of_attention + changed(MLP(cfg, name="mlp"), y, "mlp"), new_cache


class Transformer(LanguageModel):
    """A decoder-only transformer."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: Any = None,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, KVCache | None]:
        """See LanguageModel."""
        cfg = self.cfg
        batch, length = tokens.shape
        cfg.check_reach(length)
        cache = checked_past(cfg, batch, cache, KVCache)
        if isinstance(cache, int) and (cfg.scan_layers or cfg.remat):  # which take arrays
            cache = cast(KVCache, self.init_cache(batch, cache))
        offsets = jnp.arange(length, dtype=jnp.int32)[None]
        positions = offsets + cache.next_position[:, None] if isinstance(cache, KVCache) else offsets
        added = jnp.int32(length)
        if lengths is not None:
            added = lengths.astype(jnp.int32)
            positions = jnp.where(offsets < added[:, None], positions, -1)

        x, table = self._embed(tokens, train)
        if cfg.position == "learned":
            shape = (cfg.max_seq_len, cfg.embed_dim)
            places = self.param("position_embedding", table_init(cfg), shape, jnp.dtype(cfg.param_dtype))
            at = places[None, :length]
            if isinstance(cache, KVCache):
                at = wide_gradients.look_up(places, jnp.maximum(positions, 0))
            x = wide_gradients.add(x, at)
        elif cfg.position == "sinusoidal":
            x += sinusoids(positions, cfg.embed_dim, jnp.promote_types(cfg.dtype, jnp.float32)).astype(cfg.dtype)
        x = Dropout(cfg.dropout)(x, train)
        caches: Any = cache.layers if isinstance(cache, KVCache) else None
        if isinstance(cache, int):
            caches = layer_slots(cfg, cache)
        x, layers = apply_layers(Block, cfg, x, positions, caches, train)
        if cfg.norm_order != "post":
            x = Norm(cfg, name="final_norm")(x)
        logits = self._logits(x, table)
        if cache is None:
            return logits, None
        past = cache.next_position if isinstance(cache, KVCache) else jnp.zeros(batch, jnp.int32)
        return logits, KVCache(layers=layers, next_position=past + added)


def attention_implementations(model: LanguageModel, length: int) -> list[Implementation]:
    """Which function computes the attention of each layer over `length` tokens without a cache; none without layers."""
    cfg = model.cfg
    layers = cfg.layer_settings if cfg.family == "transformer" else ()
    return [Attention(cfg, layer)._implementation(length, layer.window, cached=False) for layer in layers]
