"""The layers that all families share, and the interface of a language model."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.config import ModelConfig
from jaxlm.model.cache import Cache, init_cache
from jaxlm.ops import wide_gradients
from jaxlm.ops.attention import softcap
from jaxlm.ops.dropout import draw_kept
from jaxlm.ops.matmul import matmul
from jaxlm.ops.partition import constrain, gathered
from jaxlm.types import Logits, Tokens

Initializer = Callable[..., Any]


TABLE = ("vocab", "table_embed")
"""The logical axes of an embedding table; those of an untied head are the other way round."""


def split(init: Initializer, *names: str | None) -> Initializer:
    """An initializer of a parameter with these logical axes, which `nn.get_partition_spec` finds."""
    return nn.with_logical_partitioning(init, names)


class LanguageModel(nn.Module):
    """The interface of every family: `apply({"params": params}, tokens, cache, lengths, train) -> (logits, cache)`.

    Args:
      tokens: [B, T] int32 ids below V. An id outside the vocabulary gives NaN logits.
      cache: the tokens so far; None = none, and none comes back. With a cache the same call serves a prefill, a chunk
        and a single step. A number C = none so far, and a cache of capacity C comes back: the same as from an empty
        one, but its empty slots are not read.
      lengths: [B] number of real tokens in each right-padded row. Padding is neither seen nor cached.
      train: switches dropout on, which needs `rngs={"dropout": key}` if a rate is above 0.

    Returns:
      Logits [B, T, V] of the token after each position, in at least float32, and the cache with these tokens added
      (None for None).

    Raises:
      UserError: more tokens than a learned position table has; a capacity that `init_cache` refuses.
    """

    cfg: ModelConfig

    @nn.nowrap
    def init_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache: `jaxlm.model.cache.init_cache` with this model's config."""
        return init_cache(self.cfg, batch_size, capacity)

    @nn.nowrap
    def _embed(self, tokens: Tokens, train: bool) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        """The embedding vectors of tokens, and the table they come from.

        Embedding dropout zeroes whole rows of the table, so a dropped word vanishes wherever it occurs.
        Source: Gal & Ghahramani 2016, https://arxiv.org/abs/1512.05287, section 4.2.
        """
        cfg = self.cfg
        shape = (cfg.vocab_size, cfg.embed_dim)
        table = self.param("embedding", split(table_init(cfg), *TABLE), shape, jnp.dtype(cfg.param_dtype))
        table = gathered(table, *TABLE)
        looked_up = table
        if train and cfg.embedding_dropout:
            kept = draw_kept(self.make_rng("dropout"), cfg.embedding_dropout, (cfg.vocab_size, 1))
            looked_up = looked_up * kept / (1 - cfg.embedding_dropout)
        x = constrain(wide_gradients.look_up(looked_up, tokens).astype(cfg.dtype), "batch", None, None)
        return x if cfg.embedding_scale == 1 else x * jnp.asarray(cfg.embedding_scale, cfg.dtype), table

    @nn.nowrap
    def _logits(self, x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Logits:
        cfg = self.cfg
        wide = str(jnp.promote_types(cfg.dtype, jnp.float32))
        head = Dense(cfg, cfg.vocab_size, cfg.head_bias, axes=TABLE[::-1], out_dtype=wide, name="head")
        logits = head(x, table.T if cfg.tie_embeddings else None)
        return softcap(logits if cfg.logit_divisor == 1 else logits / cfg.logit_divisor, cfg.final_softcap)


def table_init(cfg: ModelConfig) -> Initializer:
    """The initializer of embedding tables: N(0, 1) with init "torch", else N(0, 0.02)."""
    return nn.initializers.normal(1.0 if cfg.init == "torch" else 0.02)


def weight_init(cfg: ModelConfig, fan_in: int, std: float = 0.02) -> Initializer:
    """The initializer of a weight over `fan_in` features: U(+-1/sqrt(fan_in)) with init "torch", else N(0, std)."""
    return uniform_init(fan_in) if cfg.init == "torch" else nn.initializers.normal(std)


def bias_init(cfg: ModelConfig, fan_in: int) -> Initializer:
    """The initializer of a bias: U(+-1/sqrt(fan_in)) with init "torch", else 0."""
    return uniform_init(fan_in) if cfg.init == "torch" else nn.initializers.zeros


def uniform_init(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Dropout(nn.Module):
    """In training, zeroes entries with probability `rate` and divides the others by 1 - rate."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], train: bool) -> Float[Array, "*shape"]:
        """Needs the random stream "dropout" if it does anything."""
        if not train or not self.rate:
            return x
        return jnp.where(draw_kept(self.make_rng("dropout"), self.rate, x.shape), x / (1 - self.rate), 0)


class Dense(nn.Module):
    """x @ kernel + bias, kernel [in, out], whose logical axes are `axes`.

    `to_residual` marks projections into the residual stream, whose initial weights init "gpt2" scales down.
    """

    cfg: ModelConfig
    features: int
    use_bias: bool
    axes: tuple[str, str]
    to_residual: bool = False
    out_dtype: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows in"], kernel: Float[Array, "in out"] | None = None
    ) -> Float[Array, "*rows out"]:
        """Multiplies by the given kernel; None = by a parameter of its own."""
        cfg, fan_in = self.cfg, x.shape[-1]
        std = 0.02 / math.sqrt(2 * cfg.num_layers) if cfg.init == "gpt2" and self.to_residual else 0.02
        if kernel is None:
            shape = (fan_in, self.features)
            init = split(weight_init(cfg, fan_in, std), *self.axes)
            kernel = self.param("kernel", init, shape, jnp.dtype(cfg.param_dtype))
        dtype = jnp.dtype(self.out_dtype or cfg.dtype)
        out = matmul(x.astype(cfg.dtype), gathered(kernel.astype(cfg.dtype), *self.axes), dtype)
        features = None if self.axes[1] == "embed" else self.axes[1]  # the residual stream is whole on each device
        out = constrain(out, "batch", *[None] * (out.ndim - 2), features)
        if self.use_bias:
            init = split(bias_init(cfg, fan_in), features)
            bias = self.param("bias", init, (self.features,), jnp.dtype(cfg.param_dtype))
            out = wide_gradients.add(out, jnp.expand_dims(bias, range(out.ndim - 1)))
        return out


class Norm(nn.Module):
    """Layer norm, RMS norm or nothing over the last axis; moments in at least float32."""

    cfg: ModelConfig
    kind: str | None = None
    """None = the kind that the config has."""

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalises each row."""
        cfg, kind = self.cfg, self.kind or self.cfg.norm
        if kind == "none":
            return x
        offset, dtype = cfg.norm_unit_offset, jnp.dtype(cfg.dtype)
        wide, param_dtype = jnp.promote_types(dtype, jnp.float32), jnp.dtype(cfg.param_dtype)
        biased = kind == "layernorm" and (cfg.use_bias if cfg.norm_bias is None else cfg.norm_bias)
        make = nn.RMSNorm if kind == "rmsnorm" else functools.partial(nn.LayerNorm, use_bias=biased and not offset)
        norm = make(
            epsilon=cfg.norm_eps,
            dtype=wide if offset else dtype,
            param_dtype=param_dtype,
            use_scale=not offset,
            use_fast_variance=False,
        )
        nn.share_scope(self, norm)
        out = norm(x)
        if offset:  # Linen has no such norm
            out *= _row(
                1 + self.param("scale", nn.initializers.zeros, (x.shape[-1],), param_dtype).astype(wide), x.ndim
            )
            if biased:
                bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), param_dtype)
                out += _row(bias.astype(wide), x.ndim)
        return out.astype(dtype)


def _row(vector: Float[Array, " D"], ndim: int) -> Float[Array, "*ones D"]:
    return jnp.expand_dims(vector, range(ndim - 1))
