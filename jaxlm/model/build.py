"""Builds the network that a config describes, and its initial parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.model.bigram import Bigram, EmbeddingBigram
from jaxlm.model.layers import LanguageModel
from jaxlm.model.recurrent import Recurrent
from jaxlm.model.transformer import Transformer
from jaxlm.types import Params

FAMILIES: dict[str, type[LanguageModel]] = {
    "transformer": Transformer,
    "bigram": Bigram,
    "embedding_bigram": EmbeddingBigram,
    "recurrent": Recurrent,
}


def build_model(cfg: ModelConfig) -> LanguageModel:
    """The network that a config describes: a Linen module with the interface of `LanguageModel`.

    Raises:
      UserError: the config asks for float64 while JAX computes in 32 bits, or for cuDNN without an NVIDIA GPU.
    """
    if "float64" in (cfg.dtype, cfg.param_dtype) and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise UserError("dtype = 'float64' needs 64-bit JAX: set JAX_ENABLE_X64=1")
    if cfg.attention_impl == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"attention_impl = 'cudnn' needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}: "
            "give attention_impl = 'auto'"
        )
    return FAMILIES[cfg.family](cfg)


def init_params(model: LanguageModel, key: Array) -> Params:
    """Initial parameters, a nested dict of arrays, sampled with `key`."""
    return jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
