"""The decoder-only transformer: attention, MLP, blocks."""

import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from jaxlm.errors import UserError
from jaxlm.model.attention import Attention, Implementation, choose
from jaxlm.model.cache import (
    KVCache,
    LayerCache,
    checked_past,
    layer_slots,
)
from jaxlm.model.layer_stack import apply_layers
from jaxlm.model.layers import Dense, Dropout, LanguageModel, Norm, split, table_init
from jaxlm.ops import wide_gradients
from jaxlm.ops.masks import document_starts
from jaxlm.ops.partition import gathered
from jaxlm.ops.positions import sinusoids
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


class MLP(nn.Module):
    """Feed-forward sublayer. Gated activations multiply the activation by a second projection."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transforms each token separately."""
        cfg, width, axes, gated = self.cfg, self.cfg.resolved.mlp_dim, ("embed", "mlp"), self.cfg.activation in GATED
        first = Dense(cfg, width, cfg.use_bias, axes, name="gate" if gated else "up")(x)
        hidden = ACTIVATIONS[cfg.activation](first)
        if gated:
            hidden *= Dense(cfg, width, cfg.use_bias, axes, name="up")(x)
        return Dense(cfg, cfg.embed_dim, cfg.use_bias, axes[::-1], to_residual=True, name="down")(hidden)


class Block(nn.Module):
    """Attention and MLP, each with norm, dropout and residual connection."""

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
        """One layer; the cache goes in and comes out. A token sees nothing before its `first` position."""
        cfg, order = self.cfg, self.cfg.norm_order
        new_cache = None

        def attention(y: Array) -> Array:
            nonlocal new_cache
            out, new_cache = Attention(cfg, self.layer, name="attention")(y, positions, cache, train, first)
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
        documents: Int[Array, "B T"] | None = None,
    ) -> tuple[Logits, KVCache | None]:
        """See LanguageModel.

        Args:
          documents: the number of each token's document in its row (`masks.document_numbers`); a token attends to its
            own document alone. Neighbours with one number are of one document. Positions count from the beginning of
            the row all the same: with RoPE, and without positions, each document has the logits that it has alone;
            learned and sinusoidal ones stay those of the row. None = a row is one document.
        """
        cfg = self.cfg
        batch, length = tokens.shape
        cfg.check_reach(length)
        if documents is not None and (cache is not None or cfg.attention_impl == "cudnn"):
            what = "attention_impl = 'cudnn'" if cache is None else "a cache"
            raise UserError(f"documents do not go together with {what}: leave one out")
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
            init = split(table_init(cfg), None, "embed")
            places = self.param("position_embedding", init, shape, jnp.dtype(cfg.param_dtype))
            places = gathered(places, None, "embed")
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
        more = () if documents is None else (document_starts(documents),)
        x, layers = apply_layers(Block, cfg, x, positions, caches, train, *more)
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
    return [choose(cfg, length, layer.window, cached=False) for layer in layers]
