"""Parameters to and from `torchref`'s state dict: the same numbers under torch's names, kernels transposed.

This is the one place that knows the names in that state dict.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.types import Params

if TYPE_CHECKING:
    from torch import Tensor

TIED_HEAD = "head.weight"
"""The second name under which a tied torchref model has its embedding."""

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type by name."""


def to_torchref(cfg: ModelConfig, params: Params) -> dict[str, "Tensor"]:
    """Returns the state dict with which `torchref.build_model(cfg)` is the same function: copies, in `cfg.param_dtype`.

    Layers stacked by scan_layers are unstacked.

    Raises:
      UserError: parameters that do not fit the config; each that is missing, unexpected or of another shape or type is
        named.
    """
    leaves = flatten_dict(unstack_params(cfg, params) if cfg.scan_layers else params, sep="/")
    _check(
        {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()},
        _expected(cfg),
        "parameters do not fit the config",
    )
    state = {torch_name(path): to_tensor(turned(path, np.asarray(leaf))) for path, leaf in leaves.items()}
    if _is_tied(cfg):
        state[TIED_HEAD] = state[torch_name("embedding")]
    return state


def from_torchref(cfg: ModelConfig, state_dict: Mapping[str, "Tensor"]) -> Params:
    """Returns the parameters with which `jaxlm.build_model(cfg)` is the same function as a torchref model; copies.

    Raises:
      UserError: a state dict that does not fit the config; each tensor that is missing, unexpected or of another shape
        or type is named, and so is a tied head that differs from the embedding.
    """
    import torch

    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in state_dict.items()
    ):
        raise UserError(
            "state_dict is not a state dict of torchref: give names -> dense tensors, as model.state_dict() does"
        )
    arrays = {name: to_array(tensor) for name, tensor in state_dict.items()}
    expected = _expected(cfg)
    in_torch = {torch_name(path): (turned_shape(path, shape), dtype) for path, (shape, dtype) in expected.items()}
    if _is_tied(cfg):
        in_torch[TIED_HEAD] = in_torch[torch_name("embedding")]
    _check(
        {name: (array.shape, str(array.dtype)) for name, array in arrays.items()},
        in_torch,
        "state dict does not fit the config",
    )
    if _is_tied(cfg) and not np.array_equal(arrays[TIED_HEAD], arrays[torch_name("embedding")], equal_nan=True):
        raise UserError(f"{TIED_HEAD} differs from embedding.weight: give tie_embeddings = False, or tie them")
    leaves = {path: jnp.asarray(turned(path, arrays[torch_name(path)])) for path in expected}
    params = unflatten_dict(leaves, sep="/")
    return stack_params(cfg, params) if cfg.scan_layers else params


def module_name(path: str) -> str:
    """Returns torchref's name of a module: blocks.0.mlp for block_0/mlp."""
    parts = path.split("/")
    return ".".join(f"blocks.{part[6:]}" if part.startswith("block_") else part for part in parts)


def jax_name(module: str) -> str:
    """Inverts `module_name`."""
    return re.sub(r"\bblocks\.(\d+)", r"block_\1", module).replace(".", "/")


def torch_name(path: str) -> str:
    """Returns torchref's name of a parameter: blocks.0.mlp.up.weight for block_0/mlp/up/kernel."""
    parent, _, last = path.rpartition("/")
    if not parent and last in ("embedding", "position_embedding", "table"):
        return f"{last}.weight"
    last = "weight" if last in ("kernel", "scale") else last
    return f"{module_name(parent)}.{last}" if parent else last


def turned(path: str, array: np.ndarray) -> np.ndarray:
    """Transposes a kernel, from (in, out) to (out, in) or back; leaves any other parameter as it is."""
    return array.T if path.endswith("/kernel") else array


def turned_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `turned` returns."""
    return shape[::-1] if path.endswith("/kernel") else shape


def _expected(cfg: ModelConfig) -> Shapes:
    plain = dataclasses.replace(cfg, scan_layers=False, attention_impl="auto")
    model = build_model(plain)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return {path: (leaf.shape, str(leaf.dtype)) for path, leaf in flatten_dict(shapes, sep="/").items()}


def _is_tied(cfg: ModelConfig) -> bool:
    return cfg.family != "bigram" and cfg.tie_embeddings


def _check(given: Shapes, expected: Shapes, refusal: str) -> None:
    wrong = [
        f"{name} is {_shown(given.get(name))}, not {_shown(expected.get(name))}"
        for name in sorted(given.keys() | expected.keys())
        if given.get(name) != expected.get(name)
    ]
    if wrong:
        raise UserError(f"the {refusal}: {'; '.join(wrong)}")


def _shown(entry: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if entry is None else f"{list(entry[0])} {entry[1]}"
