"""The mesh of devices that a config asks for."""

import contextlib
import math
import os

import jax
from jax.sharding import AxisType, Mesh

from jaxlm.config import MeshConfig
from jaxlm.errors import UserError
from jaxlm.ops.partition import AXES


def make_mesh(cfg: MeshConfig) -> Mesh | None:
    """The mesh of a config over the first devices of JAX; None if one device of one process does all.

    Raises:
      UserError: the mesh needs more devices than there are, or in a run of many processes not all of them; an axis of
        -1 whose devices the other axes do not divide; JAX has no devices.
    """
    devices = find_devices()
    there = f"{len(devices)} ({devices[0].platform})"
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items() if size != 1)
    for axis, size in sizes.items():
        if size == -1 and len(devices) % given:
            raise UserError(f"{shown}: {given} does not divide the devices that JAX has, {there}; change the others")
        if size == -1:
            sizes[axis] = len(devices) // given
    total = math.prod(sizes.values())
    if total > len(devices):
        each = -(-total // jax.process_count())
        fix = f"; JAX_NUM_CPU_DEVICES={each} makes virtual ones" if devices[0].platform == "cpu" else ""
        raise UserError(f"{shown} needs {total} devices and JAX has {there}: give a smaller mesh{fix}")
    if jax.process_count() > 1 and total != len(devices):
        raise UserError(
            f"{shown or 'a mesh of one device'} leaves out devices of {jax.process_count()} processes, which have "
            f"{there}: give mesh.data = -1"
        )
    if total == 1:
        return None
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:total])


def find_devices() -> list[jax.Device]:
    """The devices that JAX has.

    Raises:
      UserError: it has none, as under JAX_PLATFORMS=cuda without CUDA.
    """
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={asked}: {str(error) or 'there is none'}" if asked else str(error)
        raise UserError(f"JAX finds no devices ({why}); change JAX_PLATFORMS, or unset it") from None


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """In the block, the mesh is in context: models split their parameters and activations over it. None = no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
