"""The tensors of a model, in files or in memory, each read when it is asked for."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from jaxlm.convert.flax_files import open_msgpack, torch_name
from jaxlm.convert.tensors import FLOATS, StoredTensor, check_storage, dtype_name, load_torch, to_arrays
from jaxlm.data.reading import open_regular
from jaxlm.data.reading import read_json as read_any_json
from jaxlm.errors import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
"""What a folder's weights are called, in the order in which they are looked for, whole or in shards (.index.json)."""
TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}
"""The types of safetensors that are read, by their names in the file, and NumPy's names; masks may have any of them."""


class TensorFiles:
    """The tensors of a model by name, read one at a time.

    `names`, `shape` and `dtype` come from the heads of the files. `read` reads one tensor and keeps nothing, so a
    loop over the names that drops each array holds one tensor, whatever the size of the model:

        files = open_tensors("some-llama")        # a folder or a file; `in_memory(module.state_dict(), name)` is alike
        for name in files.names:
            use(name, files.shape(name), files.dtype(name), files.read(name))

    All refusals but that of a file that changes meanwhile come from `open_tensors`.
    """

    def __init__(self, where: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.where = where
        """The file that says which tensors there are (a whole file or an index), for messages."""
        self.stored = dict(tensors)
        """Every tensor by name, in the order of the files."""

    @property
    def names(self) -> list[str]:
        """The names in the order of the files."""
        return list(self.stored)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.stored[name].shape

    def dtype(self, name: str) -> str:
        """NumPy's name of a tensor's type, or bfloat16."""
        return self.stored[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor. It may share memory with its source: copy it before you write to it.

        Raises:
          UserError: the file has gone or changed since it was opened.
        """
        return self.stored[name].read()


def open_tensors(path: Path) -> TensorFiles:
    """Opens the weights in a folder, or one file of them.

    A folder is searched for model.safetensors, pytorch_model.bin and flax_model.msgpack, whole or in shards with
    their index; the first is taken. .bin (also .pt, .pth) needs torch; what new versions of torch.save wrote is mapped
    from the disk, older files are read whole. Flax's tensors get PyTorch's names and layout.

    Raises:
      UserError: no weights, torch is missing, a damaged file, a type that NumPy lacks, or shards that do not match
        their index.
    """
    if path.is_dir():
        for name in WEIGHTS:
            for file in (path / name, path / f"{name}.index.json"):
                if file.exists():
                    return open_tensors(file)
        raise UserError(f"{path} has none of {', '.join(WEIGHTS)}, whole or in shards: save the model's weights there")
    return TensorFiles(str(path), _open_shards(path) if path.name.endswith(".index.json") else _open_file(path))


def in_memory(tensors: Mapping[str, Any], where: str) -> TensorFiles:
    """The tensors of torch in a state dict, which are not copied; `where` names it in messages.

    Raises:
      UserError: an entry is not a dense tensor with values, or of a type that NumPy lacks.
    """
    return TensorFiles(where, _of_torch(tensors, where))


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object that lies beside weights.

    Raises:
      UserError: it cannot be read, is not JSON or no object.
    """
    try:
        content = read_any_json(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give the folder of a whole model") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: save the model again")
    return content


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no weight_map from tensors to files: save the model again")
    if index.name.startswith("flax"):
        places = {torch_name(name): place for name, place in places.items()}
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", "..") or not name.isprintable():
            where = "outside its folder" if "/" in name or name == ".." else "that has no plain name"
            raise UserError(f"{index} names the file {name[:80]!r} {where}: put all shards beside it")
        shard = _open_file(index.parent / name)
        wrong = [tensor for tensor in shard if places.get(tensor) != name]
        wrong += [tensor for tensor, place in places.items() if place == name and tensor not in shard]
        if wrong:
            raise UserError(
                f"{index.parent / name} does not match {index.name}: {wrong[0]} is missing or unexpected; save again"
            )
        tensors |= shard
    return tensors


def _open_file(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if file.suffix == ".msgpack":
        return open_msgpack(file)
    tensors = load_torch(file)
    if not isinstance(tensors, Mapping):
        raise UserError(f"{file} does not hold a dict of tensors: save the model again")
    return _of_torch(tensors, str(file))


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with open_regular(file), safetensors.safe_open(file, framework="np") as opened:
            for name in list(opened.keys()):
                head = opened.get_slice(name)
                kind = head.get_dtype()
                if kind not in TYPES:
                    raise UserError(f"{file}: {name} is of type {kind}: save it as {', '.join(FLOATS)}")
                read = functools.partial(_read_safetensor, file, name)
                tensors[name] = StoredTensor(tuple(head.get_shape()), TYPES[kind], read)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): it is missing or damaged; copy it again") from None
    return tensors


def _read_safetensor(file: Path, name: str) -> np.ndarray:
    """Reads one tensor. The file is opened anew each time: its pages count as memory for as long as it is open."""
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            return opened.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): it changed while it was read; copy it again") from None


def _of_torch(tensors: Mapping[Any, Any], source: str) -> dict[str, StoredTensor]:
    def read(name: str) -> np.ndarray:
        return to_arrays({name: tensors[name]}, source)[name]

    if other := [name for name in tensors if not isinstance(name, str)]:
        raise UserError(f"{source} has the key {other[0]!r}, which is no name of a tensor: save a dict of tensors")
    types = {name: dtype_name(tensor, name, source) for name, tensor in tensors.items()}
    check_storage(tensors, source)
    return {
        name: StoredTensor(tuple(tensors[name].shape), dtype, functools.partial(read, name))
        for name, dtype in types.items()
    }
