"""How arrays are split over a mesh of devices: logical axes, the mesh axes that split them, and constraints.

A mesh is in context inside `jax.set_mesh(mesh)`. Without one, nothing here changes a program. What moves between
devices is inserted by XLA's partitioner (GSPMD), except in `locally`, where nothing moves.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxlm.errors import UserError

AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh. `data` splits the batch; `fsdp` splits the batch and all large parameters; `tensor` splits heads,
the hidden features of MLPs, and the vocabulary."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "table_embed": ("fsdp",),
    "vocab_rows": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "hidden": ("tensor",),
}
"""The mesh axes that split each logical axis; any other axis is whole on each device."""

FIELDS = {
    "embed": "embed_dim",
    "table_embed": "embed_dim",
    "hidden": "embed_dim",
    "vocab_rows": "vocab_size",
    "vocab": "vocab_size",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "mlp": "mlp_dim",
}
"""The field of ModelConfig that a refusal names for each logical axis."""

Names: TypeAlias = tuple[str | None, ...]
"""The logical axes of an array; None = an axis that is whole on each device."""


def partition_spec(names: Names, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The mesh axes that split each axis of an array.

    A batch that its mesh axes do not divide is whole on each device. If `tensor` does not divide a vocabulary, such as
    65 characters, the vocabulary is whole, and `tensor` splits the features of a table instead.

    Raises:
      UserError: another axis has a size that its mesh axes do not divide.
    """
    rules = dict(RULES)
    for name, size in zip(names, shape, strict=True):
        if name == "batch" and size % _ways(rules["batch"], mesh_shape):
            rules["batch"] = ()
        if name == "vocab" and size % _ways(rules["vocab"], mesh_shape):
            rules |= {"vocab": (), "table_embed": (*rules["table_embed"], "tensor")}
    spec = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in rules.get(name or "", ()) if mesh_shape.get(axis, 1) > 1)
        ways = _ways(axes, mesh_shape)
        if size % ways:
            raise UserError(
                f"{' x '.join(f'mesh.{axis} = {mesh_shape[axis]}' for axis in axes)} does not divide "
                f"{FIELDS.get(name or '', name)} = {size}: change the mesh or the model"
            )
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*spec)


def constrain(x: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """The same array, split over the mesh in context as its logical axes say."""
    mesh = mesh_shape()
    return x if not mesh else jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh))


def gathered(weight: Float[Array, "*shape"], *names: str | None) -> Float[Array, "*shape"]:
    """A parameter as a product reads it: not split by `fsdp`. Its gradient is split again as the parameter is."""
    return _gathered(weight, names) if mesh_shape() else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: Array, names: Names) -> Array:
    return constrain(weight, *_as_read(names))


def _as_read(names: Names) -> Names:
    return tuple(None if "fsdp" in RULES.get(name or "", ()) else name for name in names)


def _gathered_forward(weight, names):
    return _gathered(weight, names), None


def _gathered_backward(names, _, gradient):
    # Whole first: otherwise the partitioner may split activations by features to get there.
    return (constrain(constrain(gradient, *_as_read(names)), *names),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def locally(function: Callable[..., Any], in_names: Any, out_names: Any) -> Callable[..., Any]:
    """A function of arrays that each device computes on its own part, without communication (`jax.shard_map`).

    Args:
      function: returns what `out_names` describes. The first axis of its first argument is the batch.
      in_names: the logical axes of its arguments: pytrees like them, with a tuple of names for each array.
      out_names: those of its results.
    """
    mesh = mesh_shape()
    if not mesh:
        return function

    def split(*arrays: Any) -> Any:
        rows = jax.tree.leaves(arrays)[0].shape[0]
        batch = RULES["batch"] if rows % _ways(RULES["batch"], mesh) == 0 else ()

        def spec(names: Names, shape: tuple[int, ...] | None = None) -> PartitionSpec:
            single = shape is not None and bool(shape) and shape[0] == 1 and rows > 1  # one row that serves all
            return PartitionSpec(
                *((None if single else batch or None) if name == "batch" else RULES.get(name or "") for name in names)
            )

        def is_names(x: Any) -> bool:
            return type(x) is tuple and all(isinstance(name, str | None) for name in x)

        in_specs = jax.tree.map(lambda names, x: spec(names, x.shape), in_names, arrays, is_leaf=is_names)
        out_specs = jax.tree.map(spec, out_names, is_leaf=is_names)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return split


def mesh_shape() -> dict[str, int]:
    """The sizes of the axes of the mesh in context; empty = there is none, or the code is inside `locally`.

    A mesh of other axes is the user's own matter: the compiler splits a model over it as the arguments lie.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.manual_axes or not {*AXES} <= {*mesh.axis_names} else dict(mesh.shape)


def _ways(axes: tuple[str, ...], shape: Mapping[str, int]) -> int:
    return math.prod(shape.get(axis, 1) for axis in axes)
