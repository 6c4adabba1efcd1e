"""Self-attention of one layer: projections, positions, cache, and which function attends."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

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
        weights = self._score_weights()
        dropout = None
        if train and cfg.attention_dropout:
            dropout = WeightDropout(cfg.attention_dropout, self.make_rng("dropout")).numbered(*queries.shape[:3])
        if mesh_shape():  # each device attends with its own rows and heads
            out, new_cache = self._attend_locally(queries, new, positions, cache, weights, dropout, train, first)
        else:
            sow = functools.partial(self.sow, "intermediates", "attention_weights")  # does nothing unless asked for
            out, new_cache = self._attend(queries, new, positions, cache, weights, dropout, train, first, sow)
        out = rearrange(out, "b t maps h -> b t (maps h)")
        if cfg.attention_out_proj:
            bias = cfg.use_bias if cfg.attention_out_bias is None else cfg.attention_out_bias
            out = Dense(cfg, cfg.embed_dim, bias, ("heads", "embed"), to_residual=True, name="out")(out)
        return constrain(out, "batch", None, None), new_cache

    @nn.nowrap
    def _attend_locally(
        self,
        queries: Float[Array, "B T N H"],
        new: KeyValues,
        positions: Int[Array, "#B T"],
        cache: LayerCache | int | None,
        weights: dict[str, Array],
        dropout: WeightDropout | None,
        train: bool,
        first: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T maps Hv"], LayerCache | None]:
        """`_attend` on a mesh: each device computes the rows and heads that it has."""
        of_keys, of_positions = ("batch", None, "kv_heads", None), ("batch", None)
        of_new = KeyValues(of_keys, of_keys, of_positions)  # type: ignore[arg-type]
        of_weights = {name: ("heads", *[None] * (weight.ndim - 1)) for name, weight in weights.items()}
        arrays: list[Any] = [queries, new, positions, weights]
        names: list[Any] = [("batch", None, "heads", None), of_new, of_positions, of_weights]
        if isinstance(cache, LayerCache):
            arrays.append(cache)
            names.append(LAYER_CACHE_NAMES)
        if first is not None:
            arrays.append(first)
            names.append(of_positions)
        if dropout is not None:
            arrays += [jax.random.key_data(dropout.key), dropout.lines]
            names += [(None,), ("batch", None, "heads")]

        def attend_own(queries, new, positions, weights, *others):
            own_cache, own_first, own_dropout = cache, None, None
            if isinstance(cache, LayerCache):
                own_cache = others[0]
            elif first is not None:  # which goes without a cache
                own_first = others[0]
            if dropout is not None:
                key, lines = others[-2:]
                own_dropout = WeightDropout(dropout.rate, jax.random.wrap_key_data(key), lines)
            return self._attend(queries, new, positions, own_cache, weights, own_dropout, train, own_first)

        result = ("batch", None, "heads", None), None if cache is None else LAYER_CACHE_NAMES
        return locally(attend_own, tuple(names), result)(*arrays)

    @nn.nowrap
    def _attend(
        self,
        queries: Float[Array, "B T N H"],
        new: KeyValues,
        positions: Int[Array, "#B T"],
        cache: LayerCache | int | None,
        weights: dict[str, Array],
        dropout: WeightDropout | None,
        train: bool,
        first: Int[Array, "B T"] | None = None,
        on_weights: Callable[[Array], object] | None = None,
    ) -> tuple[Float[Array, "B T maps Hv"], LayerCache | None]:
        """What the queries read from the cache and from their own tokens, and the cache with these written.

        All sizes are those of the arrays: on a mesh they are a part of the batch and of the heads.
        """
        cfg, (batch, length) = self.cfg, queries.shape[:2]
        window = cache.slots if isinstance(cache, LayerCache) else self.layer.window  # slots: min(W, capacity)
        if isinstance(cache, int):
            window = cache if cache < length else None
        implementation = self._implementation(length, window, cached=isinstance(cache, LayerCache))
        seen: tuple[KeyValues, ...] = (new,)
        new_cache = None
        if isinstance(cache, LayerCache):
            seen, new_cache = cache.extend(new, in_order=implementation == "local")
        elif cache is not None:
            placed = new._replace(positions=jnp.broadcast_to(new.positions, (batch, length)))
            new_cache = new_layer_cache(cfg, batch, cache, new.keys.shape[2]).write(*placed)
        if implementation == "cudnn":
            return cudnn_attend(queries, new.keys, new.values, window, scale=cfg.attention_scale), new_cache
        options: dict[str, Any] = {"score": self._score(weights), "cap": cfg.attention_softcap, "dropout": dropout}
        if implementation == "local":
            joined = _joined(seen)
            at = positions, joined.positions, window
            batched = True if cfg.attention_impl == "local" and window else None
            out = blocked_attend(
                queries, joined.keys, joined.values, *at, first=first, batched=batched, train=train, **options
            )
            return out, new_cache
        key_positions = jnp.concatenate([part.positions for part in seen], axis=1)
        mask = attention_mask(positions, key_positions, window, first)
        past, own = (seen[0].keys, seen[0].values) if len(seen) > 1 else None, seen[-1]
        return attend(queries, own.keys, own.values, mask, past=past, on_weights=on_weights, **options), new_cache

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
        cfg, sizes = self.cfg, self.cfg.resolved
        width, hidden = sizes.head_dim, cfg.score_dim or sizes.head_dim
        halves: dict[str, tuple[int, ...]] = {}
        if cfg.attention_score == "multiplicative":
            return {"weight": self._score_weight("weight", width, width, width)}
        if cfg.attention_score == "concat":
            halves = {"key": (width,), "query": (width,)}
        elif cfg.attention_score == "additive":
            halves = {"key": (width, hidden), "query": (width, hidden)}
        weights = {f"{name}_weight": self._score_weight(name, 2 * width, *shape) for name, shape in halves.items()}
        if cfg.attention_score == "additive":
            weights["out_weight"] = self._score_weight("out", hidden, hidden)
        return weights

    @nn.nowrap
    def _score_weight(self, name: str, fan_in: int, *shape: int) -> Float[Array, "N ..."]:
        cfg = self.cfg
        init = split(weight_init(cfg, fan_in), "heads", *[None] * len(shape))
        return self.param(f"score_{name}", init, (cfg.num_heads, *shape), jnp.dtype(cfg.param_dtype)).astype(cfg.dtype)

    @nn.nowrap
    def _score(self, weights: dict[str, Float[Array, "N ..."]]) -> Score:
        """The configured score with its parameters."""
        cfg, group = self.cfg, self.cfg.num_heads // self.cfg.resolved.num_kv_heads
        grouped: dict[str, Any] = {
            name: weight.reshape(-1, group, *weight.shape[1:]) for name, weight in weights.items()
        }
        if cfg.attention_score in ("dot", "multiplicative"):
            grouped |= {"scale": cfg.attention_scale}
        score: Score = functools.partial(SCORES[cfg.attention_score], **grouped)
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
