"""The Linen modules. They own parameters; what they compute are the pure functions beside this file."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.attention import attend
from jaxlm.cache import KVCache, LayerCache, init_cache
from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.linear import matmul
from jaxlm.masks import attention_mask
from jaxlm.rope import apply_rope, rope_angles, sinusoids
from jaxlm.types import Logits, Params, Tokens

Initializer = Callable[..., Array]


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": _gelu,
}
GATED = ("swiglu", "geglu")

NOT_YET = {
    "family": "transformer",
    "value_head_dim": None,
    "kv_sharing": "grouped",
    "attention_score": "dot",
    "score_dim": None,
    "qk_norm": False,
    "attention_softcap": None,
    "final_softcap": None,
    "scan_layers": False,
    "remat": False,
}
"""Fields of ModelConfig that are declared but not built, with the one value accepted so far."""


def _uniform_fan(fan_in: int) -> Initializer:
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Dense(nn.Module):
    """x @ kernel + bias, kernel [in, out].

    `to_residual` marks the projections that write into the residual stream, which init "gpt2" scales down.
    """

    cfg: ModelConfig
    features: int
    use_bias: bool
    to_residual: bool = False
    out_dtype: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows in"], kernel: Float[Array, "in out"] | None = None
    ) -> Float[Array, "*rows out"]:
        """Multiplies by the given kernel, or by a parameter of its own."""
        cfg, fan_in = self.cfg, x.shape[-1]
        std = 0.02 / math.sqrt(2 * cfg.num_layers) if cfg.init == "gpt2" and self.to_residual else 0.02
        kernel_init = _uniform_fan(fan_in) if cfg.init == "torch" else nn.initializers.normal(std)
        bias_init = _uniform_fan(fan_in) if cfg.init == "torch" else nn.initializers.zeros
        if kernel is None:
            kernel = self.param("kernel", kernel_init, (fan_in, self.features), jnp.dtype(cfg.param_dtype))
        dtype = jnp.dtype(self.out_dtype or cfg.dtype)
        out = matmul(x.astype(cfg.dtype), kernel.astype(cfg.dtype), dtype)
        if self.use_bias:
            bias = self.param("bias", bias_init, (self.features,), jnp.dtype(cfg.param_dtype))
            out += jnp.expand_dims(bias.astype(dtype), range(out.ndim - 1))
        return out


class Norm(nn.Module):
    """Layer norm, RMS norm or nothing over the last axis; moments in at least float32."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalises each row."""
        cfg = self.cfg
        if cfg.norm == "none":
            return x
        make = nn.RMSNorm if cfg.norm == "rmsnorm" else functools.partial(nn.LayerNorm, use_bias=cfg.use_bias)
        norm = make(
            epsilon=cfg.norm_eps,
            dtype=jnp.dtype(cfg.dtype),
            param_dtype=jnp.dtype(cfg.param_dtype),
            use_fast_variance=False,
        )
        nn.share_scope(self, norm)
        return norm(x)


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
        batch, length, _ = x.shape
        heads, kv_heads, width, value_width = cfg.num_heads, cfg.kv_heads, cfg.head_width, cfg.value_width
        bias = cfg.use_bias if cfg.qkv_bias is None else cfg.qkv_bias
        queries = Dense(cfg, heads * width, bias, name="query")(x).reshape(batch, length, heads, width)
        keys = Dense(cfg, kv_heads * width, bias, name="key")(x).reshape(batch, length, kv_heads, width)
        values = Dense(cfg, kv_heads * value_width, bias, name="value")(x).reshape(batch, length, kv_heads, value_width)
        if cfg.position == "rope":
            angles = rope_angles(positions, width, cfg.rope_theta, jnp.promote_types(cfg.dtype, jnp.float32))
            queries, keys = (apply_rope(a, angles, cfg.rope_layout) for a in (queries, keys))

        window, key_positions, new_cache = self.window, positions, None
        if cache is not None:
            new_cache = cache.write(keys, values, positions)
            window = cache.positions.shape[1]  # min(W, capacity)
            if length == 1:
                keys, values, key_positions = new_cache.keys, new_cache.values, new_cache.positions
            else:  # the ring may be shorter than the prompt: see the old slots and all new keys together
                keys = jnp.concatenate([cache.keys, keys], axis=1)
                values = jnp.concatenate([cache.values, values], axis=1)
                key_positions = jnp.concatenate([cache.positions, positions], axis=1)
        mask = attention_mask(positions, key_positions, window)
        keep = None
        if train and cfg.attention_dropout:
            shape = (batch, kv_heads, heads // kv_heads, length, keys.shape[1])
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - cfg.attention_dropout, shape)
            keep = kept.astype(jnp.promote_types(cfg.dtype, jnp.float32)) / (1 - cfg.attention_dropout)
        out = attend(queries, keys, values, mask, keep).reshape(batch, length, heads * value_width)
        if cfg.attention_out_proj:
            out = Dense(cfg, cfg.embed_dim, cfg.use_bias, to_residual=True, name="out")(out)
        return out, new_cache


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


class Transformer(nn.Module):
    """A decoder-only transformer: `apply({"params": params}, tokens, cache) -> (logits, cache)`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, KVCache | None]:
        """Logits of the token after each position.

        Args:
          tokens: [B, T] int32 below V; one outside gives NaN logits.
          cache: what came before; None = nothing. With a cache T >= 1 is a prefill, a chunk or a single step alike.
          lengths: [B] real tokens of each right-padded row; padding is neither seen nor cached.
          train: dropout on; needs `rngs={"dropout": key}` where a rate is above 0.

        Returns:
          Logits [B, T, V] in at least float32, and the cache with the tokens added (None without one).

        Raises:
          ValueError: T beyond a learned position table.
        """
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

        table_init = nn.initializers.normal(1.0 if cfg.init == "torch" else 0.02)
        param_dtype = jnp.dtype(cfg.param_dtype)
        table = self.param("embedding", table_init, (cfg.vocab_size, cfg.embed_dim), param_dtype)
        looked_up = table
        if train and cfg.embedding_dropout:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - cfg.embedding_dropout, (cfg.vocab_size, 1))
            looked_up = table * kept / (1 - cfg.embedding_dropout)
        outside = jnp.where(tokens < 0, cfg.vocab_size, tokens)  # or JAX would count negative ids from the end
        x = looked_up.at[outside].get(mode="fill", fill_value=jnp.nan).astype(cfg.dtype)
        if cfg.position == "learned":
            places = self.param("position_embedding", table_init, (cfg.max_seq_len, cfg.embed_dim), param_dtype)
            if cache is None:
                x += places[None, :length].astype(cfg.dtype)
            else:
                x += places.at[jnp.maximum(positions, 0)].get(mode="fill", fill_value=jnp.nan).astype(cfg.dtype)
        elif cfg.position == "sinusoidal":
            x += sinusoids(positions, cfg.embed_dim, jnp.promote_types(cfg.dtype, jnp.float32)).astype(cfg.dtype)
        x = nn.Dropout(cfg.dropout, deterministic=not train)(x)

        layers: list[LayerCache] = []
        for i, window in enumerate(cfg.layer_windows):
            layer_cache = None if cache is None else cache.layers[i]
            x, layer_cache = Block(cfg, window, name=f"block_{i}")(x, positions, layer_cache, train)
            if layer_cache is not None:
                layers.append(layer_cache)
        if cfg.norm_order == "pre":
            x = Norm(cfg, name="final_norm")(x)

        wide = str(jnp.promote_types(cfg.dtype, jnp.float32))
        head = Dense(cfg, cfg.vocab_size, cfg.head_bias, out_dtype=wide, name="head")
        logits = head(x, table.T if cfg.tie_embeddings else None)
        if cache is None:
            return logits, None
        return logits, KVCache(layers=tuple(layers), next_position=cache.next_position + added)

    @nn.nowrap
    def init_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache, `jaxlm.cache.init_cache` of this model's config."""
        return init_cache(self.cfg, batch_size, capacity)


def build_model(cfg: ModelConfig) -> Transformer:
    """The network a config describes.

    Raises:
      ValueError: a field asks for what is not built yet, or for float64 while JAX computes in 32 bits.
    """
    for name, accepted in NOT_YET.items():
        if getattr(cfg, name) != accepted:
            raise UserError(f"{name} = {getattr(cfg, name)!r} is not there yet: leave it at {accepted!r}")
    if cfg.attention_impl not in ("auto", "reference"):
        raise UserError(f"attention_impl = {cfg.attention_impl!r} is not there yet: use 'auto' or 'reference'")
    if "float64" in (cfg.dtype, cfg.param_dtype) and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise UserError("dtype = 'float64' needs 64-bit JAX: set JAX_ENABLE_X64=1")
    return Transformer(cfg)


def init_params(model: Transformer, key: Array) -> Params:
    """Fresh parameters, a nested dict of arrays, drawn from `key`."""
    return jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
