"""Builds the network that a config describes, and its initial parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.config import ModelConfig
from jaxlm.config.model import cudnn_obstacle
from jaxlm.errors import UserError
from jaxlm.model.bigram import Bigram, EmbeddingBigram
from jaxlm.model.layers import LanguageModel
from jaxlm.model.recurrent import Recurrent
from jaxlm.model.transformer import Transformer
from jaxlm.ops.attention import cudnn_available
from jaxlm.types import Params

FAMILIES: dict[str, type[LanguageModel]] = {
    "transformer": Transformer,
    "bigram": Bigram,
    "embedding_bigram": EmbeddingBigram,
    "recurrent": Recurrent,
}


def build_model(cfg: ModelConfig) -> LanguageModel:
    """The network that a config describes: a Linen module with the interface of `LanguageModel`.

    Its `cfg` is the config, but for attention_impl "auto" where cuDNN computes it: there it says "cudnn".

    Raises:
      UserError: the config asks for float64 while JAX computes in 32 bits, or for cuDNN without an NVIDIA GPU.
    """
    if "float64" in (cfg.dtype, cfg.param_dtype) and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise UserError("dtype = 'float64' needs 64-bit JAX: set JAX_ENABLE_X64=1")
    if cfg.attention_impl == "cudnn" and not cudnn_available():
        raise UserError(
            "attention_impl = 'cudnn' needs an NVIDIA GPU of compute capability 8.0 or more, and JAX runs on "
            f"{jax.devices()[0].device_kind} ({jax.default_backend()}): give attention_impl = 'auto'"
        )
    if cfg.attention_impl == "auto" and cfg.family == "transformer" and not cudnn_obstacle(cfg) and cudnn_available():
        cfg = dataclasses.replace(cfg, attention_impl="cudnn")
    return FAMILIES[cfg.family](cfg)


def init_params(model: LanguageModel, key: Array) -> Params:
    """Initial parameters, a nested dict of arrays, sampled with `key`."""
    return jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
