"""Arrays of NumPy and tensors of torch, and trees of parameters by path."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.types import Params

if TYPE_CHECKING:
    from torch import Tensor


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by their path, such as block_0/mlp/up/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `by_path`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def to_tensor(array: Any) -> "Tensor":
    """An array as a tensor of its own on the CPU; bfloat16, which NumPy only borrows, bit by bit."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: "Tensor") -> np.ndarray:
    """A tensor as an array of its own; the inverse of `to_tensor`."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16).copy()
    return tensor.numpy().copy()


FLOATS: dict[str, str] = {name: name for name in ("bfloat16", "float32", "float64")} | {"float16": "float32"}
"""The types of weights that are read, and what they become: jaxlm has no float16, of which every value is a float32."""


def on_device(params: Params) -> Params:
    """The same parameters as JAX arrays, which share no memory with them."""
    return jax.tree.map(jnp.array, params)


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain Python types, never code.

    Raises:
      UserError: torch is missing, or the file is damaged or holds something else.
    """
    torch = import_torch(str(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: damaged archives, forbidden types, missing files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint of PyTorch ({reason}): save it again") from None


def import_torch(source: str) -> Any:
    """The torch package.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{source} needs {error.name}, which is missing: pip install 'jaxlm[parity]'") from None
    return torch


def to_numpy(found: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Tensors of torch as arrays of the same type (bfloat16 by its bits).

    Raises:
      UserError: something that is no plain tensor with values.
    """
    torch = import_torch(source)
    bits: dict[Any, Callable[[Any], np.ndarray]] = {
        torch.bfloat16: lambda tensor: tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    }
    arrays = {}
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_quantized or tensor.is_sparse:
            raise UserError(f"{source}: {name} is no plain tensor with values: save the model's own weights")
        plain = tensor.detach().cpu().contiguous()
        try:
            arrays[name] = bits.get(plain.dtype, lambda tensor: tensor.numpy())(plain)
        except TypeError:
            raise UserError(f"{source}: {name} is of type {plain.dtype}: save it as {', '.join(FLOATS)}") from None
    return arrays
