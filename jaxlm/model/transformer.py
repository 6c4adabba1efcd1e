"""The decoder-only transformer: attention, MLP, blocks."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.model.cache import KVCache, LayerCache
from jaxlm.model.layer_stack import apply_layers
from jaxlm.model.layers import Dense, LanguageModel, Norm, table_init, weight_init
from jaxlm.ops import wide_gradients
from jaxlm.ops.attention import attend, cudnn_attend
from jaxlm.ops.attention_scores import Score, additive_scores, concat_scores, dot_scores, multiplicative_scores, summed
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.positions import apply_rope, rope_angles, sinusoids
from jaxlm.ops.sliding_window import local_attend
from jaxlm.types import Logits, Tokens

LOCAL_FROM_WINDOWS, LOCAL_FROM_TOKENS = 3, 128
"""attention_impl "auto" goes local where there are at least as many queries: below, the whole mask is as fast."""


def _gelu(x: Array) -> Array:
    """As PyTorch computes it, in at least float32. The erfc of jax.nn.gelu is finer far below zero, where the result is
    next to nothing, and slower: a decoding step of 32 rows took 1.09 times as long.
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
}
GATED = ("swiglu", "geglu")


class Attention(nn.Module):
    """Self-attention of one layer: projections, positions, cache, heads joined."""

    cfg: ModelConfig
    window: int | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], cache: LayerCache | None, train: bool
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends from x to itself and to what the cache holds; returns the cache with x's keys written."""
        cfg = self.cfg
        queries, keys, values = self._project(x, positions)
        dropout = nn.Dropout(cfg.attention_dropout, deterministic=False) if train and cfg.attention_dropout else None
        window, new_cache = self.window, None
        if cache is not None:
            new_cache = cache.write(keys, values, positions)
            window = cache.slots  # min(W, capacity)

        score, cap = self._score(), cfg.attention_softcap
        if cfg.attention_impl == "cudnn" and cache is None:
            out = cudnn_attend(queries, keys, values, window)
        elif window is not None and self._goes_local(x.shape[1], window):
            key_positions = positions
            if cache is not None:
                new = keys, values, jnp.broadcast_to(positions, x.shape[:2])
                pairs = zip(cache.in_order(), new, strict=True)
                keys, values, key_positions = (jnp.concatenate(pair, axis=1) for pair in pairs)
            at = positions, key_positions, window
            out = local_attend(queries, keys, values, *at, score=score, cap=cap, on_weights=dropout)
        else:

            def watched(weights: Float[Array, "B K G T S"]) -> Float[Array, "B K G T S"]:
                self.sow("intermediates", "attention_weights", weights)  # a no-op unless asked for
                return dropout(weights) if dropout else weights

            past, key_positions = None, positions
            if new_cache is not None and x.shape[1] == 1:
                keys, values, key_positions = new_cache.keys, new_cache.values, new_cache.positions
            elif cache is not None:  # the old slots, for new tokens may overwrite what the first of them still see
                past = cache.keys, cache.values
                key_positions = jnp.concatenate([cache.positions, positions], axis=1)
            mask = attention_mask(positions, key_positions, window)
            out = attend(queries, keys, values, mask, past=past, score=score, cap=cap, on_weights=watched)
        out = out.reshape(*x.shape[:2], cfg.attention_maps * cfg.value_width)
        if cfg.attention_out_proj:
            out = Dense(cfg, cfg.embed_dim, cfg.use_bias, to_residual=True, name="out")(out)
        return out, new_cache

    @nn.nowrap
    def _goes_local(self, length: int, window: int) -> bool:
        if length == 1 or self.cfg.attention_impl == "reference":
            return False
        return self.cfg.attention_impl == "local" or length >= max(LOCAL_FROM_WINDOWS * window, LOCAL_FROM_TOKENS)

    @nn.nowrap
    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K Hv"]]:
        cfg = self.cfg
        pooled = cfg.kv_sharing == "mean_pooled"
        bias = cfg.use_bias if cfg.qkv_bias is None else cfg.qkv_bias

        def heads(name: str, count: int, width: int) -> Float[Array, "B T heads width"]:
            return Dense(cfg, count * width, bias, name=name)(x).reshape(*x.shape[:2], count, width)

        def shared(name: str, width: int) -> Float[Array, "B T K width"]:
            if not pooled:
                return heads(name, cfg.kv_heads, width)
            full = heads(name, cfg.num_heads, width)
            return full.reshape(*x.shape[:2], cfg.kv_heads, -1, width).mean(axis=3)

        queries, keys = heads("query", cfg.num_heads, cfg.head_width), shared("key", cfg.head_width)
        values = shared("value", cfg.value_width)
        if cfg.qk_norm:
            queries = Norm(cfg, "rmsnorm", name="query_norm")(queries)
            keys = Norm(cfg, "rmsnorm", name="key_norm")(keys)
        if cfg.position == "rope":
            angles = rope_angles(positions, cfg.head_width, cfg.rope_theta, jnp.promote_types(cfg.dtype, jnp.float32))
            queries, keys = (apply_rope(a, angles, cfg.rope_layout) for a in (queries, keys))
        return queries, keys, values

    @nn.nowrap
    def _score(self) -> Score:
        """The configured score with its parameters, which every query head has of its own."""
        cfg = self.cfg
        width, hidden = cfg.head_width, cfg.score_dim or cfg.head_width

        def weight(name: str, fan_in: int, *shape: int) -> Float[Array, "K G ..."]:
            init = weight_init(cfg, fan_in)
            made = self.param(f"score_{name}", init, (cfg.num_heads, *shape), jnp.dtype(cfg.param_dtype))
            return made.astype(cfg.dtype).reshape(cfg.kv_heads, -1, *shape)

        score: Score = dot_scores
        if cfg.attention_score == "multiplicative":
            score = functools.partial(multiplicative_scores, weight=weight("weight", width, width, width))
        elif cfg.attention_score == "concat":
            halves = {f"{name}_weight": weight(name, 2 * width, width) for name in ("key", "query")}
            score = functools.partial(concat_scores, **halves)
        elif cfg.attention_score == "additive":
            halves = {f"{name}_weight": weight(name, 2 * width, width, hidden) for name in ("key", "query")}
            score = functools.partial(additive_scores, **halves, out_weight=weight("out", hidden, hidden))
        return summed(score) if cfg.kv_sharing == "summed_scores" else score


class MLP(nn.Module):
    """Feed-forward sublayer; the gated kinds multiply the activation by a second projection."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each token on its own."""
        cfg = self.cfg
        hidden = ACTIVATIONS[cfg.activation](
            Dense(cfg, cfg.mlp_width, cfg.use_bias, name="gate" if cfg.activation in GATED else "up")(x)
        )
        if cfg.activation in GATED:
            hidden *= Dense(cfg, cfg.mlp_width, cfg.use_bias, name="up")(x)
        return Dense(cfg, cfg.embed_dim, cfg.use_bias, to_residual=True, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP, each with its norm, dropout and residual."""

    cfg: ModelConfig
    window: int | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], cache: LayerCache | None, train: bool
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """One layer; the cache goes in and comes out."""
        cfg = self.cfg
        drop = nn.Dropout(cfg.dropout, deterministic=not train)
        before, after = (Norm, None) if cfg.norm_order == "pre" else (None, Norm)

        def sublayer(x: Array, function: Callable[[Array], Array], norm_name: str) -> Array:
            out = drop(function(before(cfg, name=norm_name)(x) if before else x))
            out = x + out if cfg.residual else out
            return after(cfg, name=norm_name)(out) if after else out

        new_cache = None

        def attention(y: Array) -> Array:
            nonlocal new_cache
            out, new_cache = Attention(cfg, self.window, name="attention")(y, positions, cache, train)
            return out

        x = sublayer(x, attention, "attention_norm")
        if cfg.mlp_width:
            x = sublayer(x, MLP(cfg, name="mlp"), "mlp_norm")
        return x, new_cache


class Transformer(LanguageModel):
    """A decoder-only transformer."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, KVCache | None]:
        """See LanguageModel."""
        cfg = self.cfg
        length = tokens.shape[1]
        if cfg.position == "learned" and length > cfg.max_seq_len:
            raise UserError(f"{length} tokens are beyond the learned position table, max_seq_len = {cfg.max_seq_len}")
        offsets = jnp.arange(length, dtype=jnp.int32)[None]
        positions = offsets if cache is None else offsets + cache.next_position[:, None]
        added = jnp.int32(length)
        if lengths is not None:
            added = lengths.astype(jnp.int32)
            positions = jnp.where(offsets < added[:, None], positions, -1)

        x, table = self._embed(tokens, train)
        if cfg.position == "learned":
            shape = (cfg.max_seq_len, cfg.embed_dim)
            places = self.param("position_embedding", table_init(cfg), shape, jnp.dtype(cfg.param_dtype))
            at = places[None, :length] if cache is None else wide_gradients.look_up(places, jnp.maximum(positions, 0))
            x = wide_gradients.add(x, at)
        elif cfg.position == "sinusoidal":
            x += sinusoids(positions, cfg.embed_dim, jnp.promote_types(cfg.dtype, jnp.float32)).astype(cfg.dtype)
        x = nn.Dropout(cfg.dropout, deterministic=not train)(x)
        x, layers = apply_layers(Block, cfg, x, positions, None if cache is None else cache.layers, train)
        if cfg.norm_order == "pre":
            x = Norm(cfg, name="final_norm")(x)
        logits = self._logits(x, table)
        return logits, None if cache is None else KVCache(layers=layers, next_position=cache.next_position + added)
