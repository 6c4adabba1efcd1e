"""Writes weights as safetensors, in shards with an index above a size, one tensor at a time."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxlm.convert.files import TYPES
from jaxlm.errors import UserError

SHARD_SIZE = "5GB"
"""The default of `write_shards`, which is that of the Hub."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NAMES = {dtype: name for name, dtype in TYPES.items()}

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and type (NumPy's name, or bfloat16) of each tensor, in the order of the model."""


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as 5GB or 200MB; a unit is a power of 1,000, as on the Hub.

    Raises:
      UserError: another text, or a size below one byte.
    """
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 1 <= size < math.inf:
        raise UserError(f"{text!r} is no size: give a number and {', '.join(UNITS)}, such as {SHARD_SIZE}")
    return int(size)


def write_shards(
    folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]], shard_size: int
) -> list[Path]:
    """Writes model.safetensors, or model-00001-of-0000N.safetensors and model.safetensors.index.json.

    The tensors come one at a time and in any order; each is on the disk before the next is asked for. They are cut as
    transformers cuts them: in the order of `shapes`, each shard at most `shard_size` bytes, a larger tensor alone.
    Files are written aside and renamed when all are whole, so a failure leaves nothing behind.

    Args:
      folder: an existing folder without weights.

    Returns: the files.

    Raises:
      UserError: they cannot be written, or the folder holds weights, which a reader could take for these.
      ValueError: `tensors` are not those that `shapes` names.
    """
    if there := sorted(folder.glob("model*.safetensors*")):
        raise UserError(f"{there[0]} is there already: give a folder without weights")
    sizes = {name: math.prod(shape) * _itemsize(dtype) for name, (shape, dtype) in shapes.items()}
    shards = _cut(sizes, shard_size)
    numbers = [""] if len(shards) == 1 else [f"-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    files = {f"model{number}.safetensors": shard for number, shard in zip(numbers, shards, strict=True)}
    try:
        with tempfile.TemporaryDirectory(prefix=".weights-", dir=folder) as name:
            aside = Path(name)
            places = {}
            for file, shard in files.items():
                for tensor, at in _write_head(aside / file, {one: shapes[one] for one in shard}).items():
                    places[tensor] = (file, at)
            _write_values(aside, shapes, tensors, places)
            written = list(files)
            if len(shards) > 1:
                parameters = sum(math.prod(shape) for shape, _ in shapes.values())
                metadata = {"total_parameters": parameters, "total_size": sum(sizes.values())}
                index = {"metadata": metadata, "weight_map": {tensor: file for tensor, (file, _) in places.items()}}
                written.append("model.safetensors.index.json")
                (aside / written[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for file in written:
                os.replace(aside / file, folder / file)
    except OSError as error:
        needed = sum(sizes.values())
        raise UserError(
            f"{folder} cannot hold the weights ({error.strerror or error}): give a folder with {needed:,} bytes free"
        ) from None
    return [folder / file for file in written]


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _cut(sizes: Mapping[str, int], shard_size: int) -> list[list[str]]:
    """Groups names in order, as huggingface_hub's split_state_dict_into_shards_factory does."""
    shards: list[list[str]] = []
    current: list[str] = []
    left = shard_size
    for name, size in sizes.items():
        if size > shard_size:
            shards.append([name])
            continue
        if size > left:
            shards.append(current)
            current, left = [], shard_size
        current.append(name)
        left -= size
    return [*shards, current] if current or not shards else shards


def _write_head(file: Path, shapes: Shapes) -> dict[str, int]:
    """Writes the head of a safetensors file and makes room for its values; returns where each tensor begins.

    The format: 8 bytes (the length of the head), the head in JSON, then the values without gaps. Wider types come
    first, so that each tensor is aligned (https://github.com/huggingface/safetensors#format).
    """
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for name in sorted(shapes, key=lambda name: -_itemsize(shapes[name][1])):
        shape, dtype = shapes[name]
        end = at + math.prod(shape) * _itemsize(dtype)
        head[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, end]}
        places[name], at = at, end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)
    return {name: 8 + len(text) + start for name, start in places.items()}


def _write_values(
    folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]], places: Mapping[str, tuple[str, int]]
) -> None:
    left = set(places)
    for name, tensor in tensors:
        if name not in left:
            raise ValueError(f"{name} comes twice or is not among the shapes")
        if (tensor.shape, str(tensor.dtype)) != shapes[name]:
            raise ValueError(f"{name} is {tensor.shape} {tensor.dtype}, not {shapes[name]}")
        left.remove(name)
        file, at = places[name]
        with (folder / file).open("r+b") as opened:
            opened.seek(at)
            opened.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    if left:
        raise ValueError(f"{min(left)} never came")
