"""Builds the network that a config describes, and its initial parameters."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxlm.config import ModelConfig
from jaxlm.config.model import cudnn_obstacle
from jaxlm.errors import UserError
from jaxlm.model.bigram import Bigram, EmbeddingBigram
from jaxlm.model.layers import LanguageModel
from jaxlm.model.recurrent import Recurrent
from jaxlm.model.transformer import Transformer
from jaxlm.ops.attention import cudnn_available
from jaxlm.ops.partition import mesh_shape, partition_spec
from jaxlm.types import Params

FAMILIES: dict[str, type[LanguageModel]] = {
    "transformer": Transformer,
    "bigram": Bigram,
    "embedding_bigram": EmbeddingBigram,
    "recurrent": Recurrent,
}

TOKEN = np.zeros((1, 1), np.int32)
"""Tokens to initialise a model with."""


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
    """Initial parameters, a nested dict of arrays, sampled with `key`.

    With a mesh in context each is sampled split over it, and no device holds the whole. The numbers are the same.
    """
    shardings = None
    if mesh_shape():
        mesh = jax.sharding.get_abstract_mesh()
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(model, dict(mesh.shape)))
    return jax.jit(functools.partial(_init, model), out_shardings=shardings)(key)


def param_specs(model: LanguageModel, sizes: Mapping[str, int]) -> Params:
    """How each parameter is split over a mesh with axes of these sizes, a tree of `PartitionSpec`; nothing is computed.

    Raises:
      UserError: the mesh does not divide a size of the model.
    """
    cfg = model.cfg
    if cfg.family == "transformer":  # a kernel has all heads side by side, so its size does not tell
        for name, size in (("heads", cfg.num_heads), ("kv_heads", cfg.resolved.num_kv_heads)):
            partition_spec((name,), (size,), sizes)
    boxed = jax.eval_shape(model.init, jax.random.key(0), TOKEN)["params"]
    names = nn.get_partition_spec(boxed)

    def spec(leaf: Any, names: PartitionSpec) -> PartitionSpec:
        return partition_spec((*names, *[None] * (leaf.ndim - len(names))), leaf.shape, sizes)

    return jax.tree.map(spec, nn.unbox(boxed), names)


def _init(model: LanguageModel, key: Array) -> Params:
    return nn.unbox(model.init(key, TOKEN))["params"]
