"""Flax's msgpack files of weights: the file is mapped, and only its keys and the heads of its arrays are read."""

import functools
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from jaxlm.convert.tensors import StoredTensor
from jaxlm.data.reading import open_regular
from jaxlm.errors import UserError

CHUNKED = "__msgpack_chunked_array__"
"""The key that marks an array above 2^30 bytes, which flax.serialization stores in pieces."""
ARRAYS = (1, 3)
"""The codes under which flax.serialization stores arrays and NumPy scalars."""
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}
"""The bytes that hold the length of a byte string or extension type, by msgpack's first byte."""


def torch_name(path: str) -> str:
    """PyTorch's name of a tensor of Flax: transformer.ln_f.weight for transformer/ln_f/scale."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def open_msgpack(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a flax_model.msgpack under PyTorch's names; kernels are transposed, (in, out) to (out, in).

    These are the rules by which transformers 4 loaded weights of Flax into modules of PyTorch.

    Raises:
      UserError: it cannot be read, or holds something else than nested dicts of arrays.
    """
    tensors = {}
    try:
        with open_regular(file) as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(data)
        tree = cursor.tree()
        if cursor.at != len(data):
            raise ValueError(f"{len(data)} bytes, not {cursor.at}")
        for path, leaf in _leaves(tree, ""):
            if path.endswith("/kernel"):
                leaf = StoredTensor(leaf.shape[::-1], leaf.dtype, functools.partial(_transposed, leaf.read))
            tensors[torch_name(path)] = leaf
    except Exception as error:  # of many kinds: it is missing, cut off, or something else
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read as weights of Flax ({reason}): it is damaged; copy it again") from None
    return tensors


class _Cursor:
    """Walks over msgpack without reading the values of arrays."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def tree(self) -> dict[str, Any]:
        """Reads a map; its values are maps, arrays (as StoredTensor) or small objects."""
        found: dict[str, Any] = {}
        for _ in range(self._take(msgpack.Unpacker.read_map_header)):
            key = self._take(msgpack.Unpacker.unpack)
            first = self._data[self.at]
            if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
                found[key] = self.tree()
            elif 0xC7 <= first <= 0xC9 or 0xD4 <= first <= 0xD8:
                found[key] = self._array()
            else:
                found[key] = self._take(msgpack.Unpacker.unpack)
        return found

    def _array(self) -> StoredTensor:
        """Reads the head of an array: an extension type that holds (shape, name of the type, bytes)."""
        length = self._length()
        code, end = self._data[self.at], self.at + 1 + length
        self.at += 1
        if code not in ARRAYS:
            raise ValueError(f"extension type {code} is no array")
        if self._take(msgpack.Unpacker.read_array_header) != 3:
            raise ValueError("an array without shape, type and bytes")
        shape, name = self._take(msgpack.Unpacker.unpack), self._take(msgpack.Unpacker.unpack)
        dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
        if dtype.kind not in "fiub" and dtype != jnp.bfloat16:
            raise ValueError(f"an array of type {name}")
        size = self._length()
        if not all(type(width) is int and width >= 0 for width in shape):
            raise ValueError(f"an array of shape {shape}")
        if size != math.prod(shape) * dtype.itemsize or self.at + size != end or end > len(self._data):
            raise ValueError(f"{size} bytes for an array {shape} of {name}")
        read = functools.partial(_mapped, self._data, self.at, tuple(shape), dtype)
        self.at = end
        return StoredTensor(tuple(shape), str(dtype), read)

    def _length(self) -> int:
        """Reads the first bytes of a byte string or an extension type: how long it is."""
        first = self._data[self.at]
        self.at += 1
        if 0xD4 <= first <= 0xD8:
            return 1 << (first - 0xD4)
        bytes_of_length = _LENGTHS[first]
        self.at += bytes_of_length
        return int.from_bytes(self._data[self.at - bytes_of_length : self.at], "big")

    def _take(self, read: Callable[[msgpack.Unpacker], Any]) -> Any:
        """Reads one small object, or the head of a large one, and goes on behind it."""
        unpacker = msgpack.Unpacker()
        unpacker.feed(self._data[self.at : self.at + 1024])
        value = read(unpacker)
        self.at += unpacker.tell()
        return value


def _leaves(tree: dict[str, Any], parent: str) -> Iterator[tuple[str, StoredTensor]]:
    for key, value in tree.items():
        path = f"{parent}/{key}" if parent else key
        if isinstance(value, StoredTensor):
            yield path, value
        elif not isinstance(value, dict):
            raise ValueError(f"{path!r} is no array")
        elif CHUNKED in value:
            shape, pieces = ([part[str(i)] for i in range(len(part))] for part in (value["shape"], value["chunks"]))
            if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
                raise ValueError(f"{path!r} lacks a piece")
            read = functools.partial(_joined, [piece.read for piece in pieces], tuple(shape))
            yield path, StoredTensor(tuple(shape), pieces[0].dtype, read)
        else:
            yield from _leaves(value, path)


def _mapped(data: mmap.mmap, at: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)


def _joined(pieces: list[Callable[[], np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([read() for read in pieces]).reshape(shape)


def _transposed(read: Callable[[], np.ndarray]) -> np.ndarray:
    return read().T
