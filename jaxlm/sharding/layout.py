"""Where arrays lie on the mesh in context: the state of an optimizer beside its parameters, and arrays of the host."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config import TrainConfig
from jaxlm.data.batches import Read, on_one_device
from jaxlm.errors import UserError
from jaxlm.model.build import init_params, param_specs
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.partition import mesh_shape, partition_spec
from jaxlm.types import Params


def shardings(tree: Any) -> Any:
    """Where each array of a tree lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def optimizer_shardings(tx: optax.GradientTransformation, params: Params) -> Any:
    """How the state of an optimizer is split over the mesh on which its parameters lie; nothing is computed.

    What belongs to a parameter (a moment, whole or reduced along some axes) is split as the parameter is, along the
    axes that it still has. All else, such as counters, is whole on each device.

    Args:
      params: arrays, or their shapes with a `sharding`.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    mesh = next(iter(known.values())).sharding.mesh

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = (path[i:j] for i in range(len(path)) for j in range(len(path), i, -1))
        param = next((known[part] for part in parts if part in known), None)
        spec = PartitionSpec() if param is None else _kept(leaf.shape, param)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _kept(shape: tuple[int, ...], param: Any) -> PartitionSpec:
    """How a parameter is split, along those of its axes that an array of this shape has."""
    spec = (*param.sharding.spec, *[None] * (param.ndim - len(param.sharding.spec)))
    if len(shape) == param.ndim:  # a reduced axis has length 1
        return PartitionSpec(*(axes if a == b else None for a, b, axes in zip(shape, param.shape, spec, strict=True)))
    left, kept = list(zip(param.shape, spec, strict=True)), []
    for size in shape:
        place = next((i for i, (own, _) in enumerate(left) if own == size), None)
        kept.append(None if place is None else left[place][1])
        left = left if place is None else left[place + 1 :]
    return PartitionSpec(*kept)


def put(shape: tuple[int, ...], dtype: np.dtype, read: Read, *names: str | None) -> jax.Array:
    """An array on the devices: split over the mesh in context by its logical axes, or on one device without a mesh.

    Each process reads only the parts of its own devices.
    """
    if not mesh_shape():
        return on_one_device(shape, dtype, read)
    mesh = jax.sharding.get_mesh()
    sharding = NamedSharding(mesh, partition_spec(names, shape, dict(mesh.shape)))
    return jax.make_array_from_callback(shape, sharding, cast(Any, read), dtype=dtype)


def put_array(array: np.ndarray, *names: str | None) -> jax.Array:
    """`put` of an array in memory."""
    return put(array.shape, array.dtype, lambda part: array[part], *names)


def put_like(array: np.ndarray, like: jax.Array) -> jax.Array:
    """An array in memory, where another one lies."""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda part: array[cast(Any, part)])


def to_host(leaf: Any) -> np.ndarray:
    """A whole array in the memory of this process; of several processes all call it alike."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def abstract_params(model: LanguageModel) -> Params:
    """The shapes and types of a model's parameters, on a mesh in context with their shardings; nothing is computed."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if not mesh_shape():
        return params
    mesh = jax.sharding.get_mesh()

    def placed(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, params, param_specs(model, dict(mesh.shape)))


def put_params(model: LanguageModel, params: Params) -> Params:
    """Parameters from anywhere, split over the mesh in context as the model declares; without a mesh as they are."""
    if not mesh_shape():
        return params
    mesh = jax.sharding.get_mesh()

    def placed(leaf: Any, spec: PartitionSpec) -> jax.Array:
        array = to_host(leaf)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda part: array[cast(Any, part)])

    return jax.tree.map(placed, params, param_specs(model, dict(mesh.shape)))


def micro_batch_rows(cfg: TrainConfig, sizes: Mapping[str, int]) -> int:
    """The rows of a micro-batch on each device of a mesh with axes of these sizes.

    Raises:
      UserError: data x fsdp does not divide the rows of a micro-batch.
    """
    ways, rows = sizes["data"] * sizes["fsdp"], cfg.batch_size // cfg.grad_accum
    if rows % ways:
        raise UserError(
            f"mesh.data x mesh.fsdp = {sizes['data']} x {sizes['fsdp']} = {ways} does not divide the {rows} rows of a "
            f"micro-batch (train.batch_size = {cfg.batch_size}, train.grad_accum = {cfg.grad_accum}): give a "
            f"--train.batch-size that is a multiple of {ways * cfg.grad_accum}, or a smaller mesh"
        )
    return rows // ways
