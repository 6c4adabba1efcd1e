"""The memory of training on one device of a mesh, from shapes and their splitting alone: nothing is allocated."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxlm.analysis.costs import activation_bytes_per_sequence, cache_bytes
from jaxlm.config import ExperimentConfig, ModelConfig
from jaxlm.model.build import build_model, init_params, param_specs
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.partition import partition_spec
from jaxlm.optim import build_optimizer
from jaxlm.sharding.layout import micro_batch_rows, optimizer_shardings
from jaxlm.types import Params

MeshShape = Mapping[str, int]
"""The sizes of the axes data, fsdp and tensor."""


class DeviceMemory(NamedTuple):
    """Bytes that training takes on each device."""

    parameters: int
    gradients: int
    gradient_totals: int
    """The sums over micro-batches, beside the gradients of one."""
    optimizer_state: int
    weights_in_use: int
    """Copies of parameters in the type of the products and not split by fsdp, as products read them: those of one layer
    with remat, else of all, because the backward pass reads them again."""
    activations: int
    """What a micro-batch keeps for its backward pass, without the logits (an estimate without dropout)."""
    recomputed_layer: int
    """With remat: what the layer that is computed again keeps until its gradient is done."""
    logits: int
    """What the loss keeps of the logits, and their gradient."""

    @property
    def total(self) -> int:
        """The sum: what must live at once. What XLA fuses takes less, and its temporary arrays take more."""
        return sum(self)


class DeviceState(NamedTuple):
    """Bytes of DeviceMemory that do not depend on the batch."""

    parameters: int
    optimizer_state: int
    weights_in_use: int


class Leaf(NamedTuple):
    """A parameter as the plan sees it."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """The axes of the mesh that split it."""
    stored: int
    """Bytes on each device."""
    read: int
    """Bytes of what a product reads, in the type in which it is gathered; whole over what `gathered_over` names."""
    gathered_over: tuple[str, ...]
    """The axes over which a product needs it whole."""
    layers: int
    """How many layers it holds, stacked; 0 = it belongs to no layer."""


def device_leaves(cfg: ModelConfig, mesh: MeshShape) -> list[Leaf]:
    """The parameters of a model, split over a mesh that may have more devices than this machine.

    Raises:
      UserError: the mesh does not divide a size of the model.
    """
    _, params = _abstract(cfg)
    specs = jax.tree.leaves(_specs(cfg, **mesh), is_leaf=_is_spec)
    leaves = []
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True):
        name, axes = jax.tree_util.keystr(path, simple=True, separator="/"), axes_of(spec)
        # Kernels are gathered in the type of their product, tables as they are stored.
        dtype = jnp.dtype(cfg.dtype) if name.endswith("kernel") else leaf.dtype
        over = next((axes_in(entry) for entry in spec if "fsdp" in axes_in(entry)), ())
        layers = leaf.shape[0] if name.startswith("layers/") else int(name.startswith("block_"))
        leaves.append(
            Leaf(
                path=name,
                shape=leaf.shape,
                axes=axes,
                stored=leaf.size * leaf.dtype.itemsize // ways(axes, mesh),
                read=leaf.size * dtype.itemsize // ways([axis for axis in axes if axis not in over], mesh),
                gathered_over=over,
                layers=layers,
            )
        )
    return leaves


def device_state(config: ExperimentConfig, mesh: MeshShape) -> DeviceState:
    """The parameters, their copies and the optimizer's state on each device, leaf by leaf.

    Raises:
      UserError: the mesh does not divide a size of the model; there is no such optimizer.
    """
    _, params = _abstract(config.model)
    leaves, specs = device_leaves(config.model, mesh), _specs(config.model, **mesh)
    devices = AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    placed = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(devices, spec)),
        params,
        specs,
    )
    tx = build_optimizer(config.optim, config.train.steps)
    state, shardings = jax.eval_shape(tx.init, params), optimizer_shardings(tx, placed)
    return DeviceState(
        parameters=sum(leaf.stored for leaf in leaves),
        optimizer_state=sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
        ),
        weights_in_use=_weights_in_use(config.model, leaves),
    )


def device_memory(config: ExperimentConfig, mesh: MeshShape) -> DeviceMemory:
    """What must live at once on each device in a training step.

    Raises:
      UserError: the mesh does not divide the batch or a size of the model.
    """
    cfg, rows = config.model, micro_batch_rows(config.train, mesh)
    state = device_state(config, mesh)
    wide = np.promote_types(jnp.dtype(cfg.param_dtype), np.float32).itemsize // jnp.dtype(cfg.param_dtype).itemsize
    kept = _kept_by_a_sequence(dataclasses.replace(local_model(cfg, mesh), remat=False))
    activations, again = kept.rest + cfg.num_layers * kept.layer, 0
    if cfg.remat and kept.layer:
        inputs = cfg.max_seq_len * cfg.embed_dim * jnp.dtype(cfg.dtype).itemsize
        activations, again = kept.rest + cfg.num_layers * inputs, kept.layer
    return DeviceMemory(
        parameters=state.parameters,
        gradients=state.parameters,
        gradient_totals=wide * state.parameters if config.train.grad_accum > 1 else 0,
        optimizer_state=state.optimizer_state,
        weights_in_use=state.weights_in_use,
        activations=activations * rows,
        recomputed_layer=again * rows,
        logits=kept.logits * rows,
    )


class _Kept(NamedTuple):
    """Bytes of a sequence of max_seq_len tokens that the backward pass reads, without remat."""

    layer: int
    logits: int
    """With their gradient."""
    rest: int


@functools.lru_cache(maxsize=64)
def _kept_by_a_sequence(cfg: ModelConfig) -> _Kept:
    """Found with one and two periods of layers: each further one keeps as much."""
    gradient = cfg.max_seq_len * cfg.vocab_size * np.promote_types(jnp.dtype(cfg.dtype), np.float32).itemsize
    layered = cfg.family in ("transformer", "recurrent")
    period = len(cfg.layer_period)
    one = dataclasses.replace(cfg, num_layers=period) if layered else cfg
    own = activation_bytes_per_sequence(one)
    of_other_entries = own - activation_bytes_per_sequence(dataclasses.replace(one, vocab_size=1))
    logits = of_other_entries * cfg.vocab_size // max(1, cfg.vocab_size - 1)
    if not layered:
        return _Kept(0, logits + gradient, own - logits)
    layers = activation_bytes_per_sequence(dataclasses.replace(cfg, num_layers=2 * period)) - own
    return _Kept(layers // period, logits + gradient, own - logits - layers)


def device_cache(cfg: ModelConfig, mesh: MeshShape) -> int:
    """Bytes of a row's cache for max_seq_len tokens on each device that holds a part of its heads."""
    return cache_bytes(local_model(cfg, mesh), cfg.max_seq_len)


def local_model(cfg: ModelConfig, mesh: MeshShape) -> ModelConfig:
    """The model that each device computes: `tensor` splits heads, hidden features of MLPs and, where it can, the
    vocabulary.

    A model without an output projection of attention gets one, because the residual stream is whole on each device.

    Raises:
      UserError: `tensor` does not divide the heads or the hidden features.
    """
    tensor, sizes = mesh["tensor"], cfg.resolved
    if cfg.family == "transformer":
        for name, size in (("heads", cfg.num_heads), ("kv_heads", sizes.num_kv_heads), ("mlp", sizes.mlp_dim)):
            partition_spec((name,), (size,), mesh)  # refuses it
    changes: dict[str, Any] = {} if cfg.vocab_size % tensor else {"vocab_size": cfg.vocab_size // tensor}
    if cfg.family == "transformer" and tensor > 1:
        changes |= {
            "num_heads": cfg.num_heads // tensor,
            "num_kv_heads": sizes.num_kv_heads // tensor,
            "head_dim": sizes.head_dim,
            "value_head_dim": sizes.value_head_dim,
            "mlp_dim": sizes.mlp_dim // tensor,
            "attention_out_proj": True,
        }
    if cfg.attention_impl == "cudnn":  # no program shows what its kernel does
        changes["attention_impl"] = "auto"
    return dataclasses.replace(cfg, **changes)


@functools.lru_cache(maxsize=16)
def _abstract(cfg: ModelConfig) -> tuple[LanguageModel, Params]:
    """The model and the shapes of its parameters, on any machine: those of cuDNN's attention are those of any other."""
    model = build_model(dataclasses.replace(cfg, attention_impl="auto") if cfg.attention_impl == "cudnn" else cfg)
    return model, jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.lru_cache(maxsize=64)
def _specs(cfg: ModelConfig, data: int, fsdp: int, tensor: int) -> Params:
    """How the parameters are split."""
    return param_specs(_abstract(cfg)[0], {"data": data, "fsdp": fsdp, "tensor": tensor})


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def axes_in(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh in one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of the mesh that split an array."""
    return tuple(axis for entry in spec for axis in axes_in(entry))


def ways(axes: Any, mesh: MeshShape) -> int:
    """Into how many parts these axes split an array."""
    return math.prod(mesh[axis] for axis in axes)


def _weights_in_use(cfg: ModelConfig, leaves: list[Leaf]) -> int:
    """Of layers, one with remat, else all; of the rest, all. A parameter that is read as it is stored needs no copy.

    A table that is the head, too, is also there in the type of the product.
    """
    copied = [leaf for leaf in leaves if leaf.read != leaf.stored]
    own = sum(leaf.read for leaf in copied if not leaf.layers)
    of_layers = sum(leaf.read for leaf in copied if leaf.layers)
    if cfg.dtype != cfg.param_dtype and cfg.tie_embeddings:
        sizes = jnp.dtype(cfg.dtype).itemsize, jnp.dtype(cfg.param_dtype).itemsize
        own += sum(leaf.read * sizes[0] // sizes[1] for leaf in leaves if leaf.path == "embedding")
    return own + (of_layers // cfg.num_layers if cfg.remat and of_layers else of_layers)
