"""Arrays of NumPy from tensors of torch and back; every conversion between the two is here."""

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.arrays import check_members
from jaxlm.data.reading import open_regular
from jaxlm.errors import UserError
from jaxlm.sharding.mesh import find_devices
from jaxlm.types import Params

if TYPE_CHECKING:
    from torch import Tensor


FLOATS: dict[str, str] = {name: name for name in ("bfloat16", "float32", "float64")} | {"float16": "float32"}
"""The types of weights that are read, and what each becomes: jaxlm has no float16, but every float16 is a float32."""

_NUMPY = {"scalar": "a NumPy number", "_reconstruct": "a NumPy array"}


class StoredTensor(NamedTuple):
    """A tensor whose values are read when `read` is called."""

    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of its type, or bfloat16."""
    read: Callable[[], np.ndarray]
    """Returns the values. They may share memory with a mapped file or a module: copy them before you write to them."""


def to_tensor(array: Any) -> "Tensor":
    """Copies an array to a tensor on the CPU. torch cannot read NumPy's bfloat16, so that goes bit by bit."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: "Tensor") -> np.ndarray:
    """Copies a tensor to an array; the inverse of `to_tensor`."""
    return _as_array(tensor).copy()


def to_arrays(tensors: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Reads named tensors as arrays of the same type, without copying those on the CPU.

    Raises:
      UserError: torch is missing, or an entry is not a dense tensor with values, or of a type that NumPy lacks.
    """
    types = {name: dtype_name(tensor, name, source) for name, tensor in tensors.items()}
    return {name: _as_array(tensors[name]) for name in types}


def dtype_name(tensor: Any, name: str, source: str) -> str:
    """Returns NumPy's name (or bfloat16) of the type of a tensor, which an error calls by `name`.

    Raises:
      UserError: torch is missing, or it is not a dense tensor with values, or of a type that NumPy lacks.
    """
    torch = import_torch(source)
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_quantized or tensor.is_sparse:
        raise UserError(f"{source}: {name} is not a dense tensor with values: save the model's own weights")
    try:
        return str(_as_array(torch.empty(0, dtype=tensor.dtype)).dtype)
    except TypeError:
        raise UserError(f"{source}: {name} is of type {tensor.dtype}: save it as {', '.join(FLOATS)}") from None


def check_storage(tensors: Mapping[str, "Tensor"], source: str) -> None:
    """Refuses tensors that have many more values than are stored: views by which a small file fills the memory.

    Raises:
      UserError: all together they have more than twice the bytes of their storages, as a tied table has.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    held, told = sum(storages.values()), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if told > 2 * held:
        raise UserError(f"{source} has tensors of {told:,} bytes in {held:,}: save the values, not views of them")


def _as_array(tensor: "Tensor") -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def on_device(params: Params) -> Params:
    """Copies parameters to JAX arrays, which share no memory with the originals."""
    find_devices()
    return jax.tree.map(jnp.array, params)


def load_torch(path: Path) -> Any:
    """Reads on the CPU what `torch.save` wrote: tensors and plain Python types, never code.

    Tensors stay on the disk until they are used, so copy them before the file may change. Files of versions before
    1.6, which are no zip archives, are read whole.

    Raises:
      UserError: torch is missing, or the file is damaged or holds something else.
    """
    torch = import_torch(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in other versions, which it reads or refuses
            with open_regular(path) as file:
                size, is_archive = os.fstat(file.fileno()).st_size, zipfile.is_zipfile(file)
                if is_archive:  # torch unpacks what it does not need, too
                    with zipfile.ZipFile(file) as archive:
                        check_members(archive.infolist(), size, 0)
                        for one in archive.infolist():  # torch takes six times what is no tensor
                            if "/data/" not in one.filename and one.file_size > 1 << 24:
                                raise ValueError(f"its {one.filename} has more than 16 MiB")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({reason}): save it again") from None
    except Exception as error:  # of many kinds: damaged archives, forbidden types, missing files
        message = re.sub(r"\x1b\[[\d;]*m", "", str(error))
        if found := re.search(r"GLOBAL ([\w.]+) was not an allowed global", message):
            kind = _NUMPY.get(found[1].rpartition(".")[2], "an object") if "numpy" in found[1] else "an object"
            raise UserError(
                f"{path} holds {kind} of type {found[1]}, and only tensors and plain Python values are read, because "
                "others may run code: where you trust the file, load it with weights_only=False, leave that entry out "
                "or make it plain, as by float(x) or x.tolist(), and torch.save it again"
            ) from None
        reason = message.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = re.split(r"\. |\n", reason)[0].rstrip(".")
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({reason}): save it again") from None


def load_training(path: Path, kind: str, file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dicts `model_args` and `model` of a checkpoint that a training script wrote.

    A pickle can hold one list many times within itself: 2 kB that have 2^40 items when they are printed or compared. So
    a value of `model_args` is plain, or a list or dict of plain values.

    Args:
      kind: what the message calls the checkpoint.
      file: what the message tells the user to give.

    Raises:
      UserError: as `load_torch`, the dicts are missing, or an entry of `model_args` is of another type.
    """
    checkpoint = load_torch(path)
    parts = [checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("model_args", "model")]
    settings, model = parts
    if not isinstance(settings, dict) or not isinstance(model, dict):
        raise UserError(f"{path} is not {kind}: it lacks the dicts model_args and model; give {file}")
    for name, value in settings.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: model_args has a name of type {type(name).__name__}: give texts as names")
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        for one in inside if isinstance(inside, list | tuple) else [value]:
            if not isinstance(one, str | int | float | None) or (isinstance(one, int) and one.bit_length() > 64):
                told = "a number beyond 64 bits" if isinstance(one, int) else f"a value of type {type(one).__name__}"
                raise UserError(f"{path}: model_args: {name} has {told}: give a number, a text, or a list of them")
    return settings, model


def import_torch(source: str) -> Any:
    """Imports the torch package, which `source` needs.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{source} needs {error.name}, which is missing: pip install 'jaxlm[parity]'") from None
    return torch
