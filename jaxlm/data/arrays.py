"""NumPy's files that others wrote: .npy and .npz without objects, no larger in memory than the file or a bound."""

import io
import math
import os
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from jaxlm.data.reading import open_regular

UNPACKED = 1 << 25
"""Bytes that compressed arrays of an .npz file may have: a file can pack zeros to a thousandth."""


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file.

    Raises:
      OSError: as `open_regular`.
      ValueError: it is no such file, holds objects, or has fewer or more bytes than its head says.
    """
    with open_regular(path) as file:
        return _read(file, os.fstat(file.fileno()).st_size)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, sorted.

    Raises:
      OSError: as `open_regular`.
      ValueError: it is no archive of .npy files, one is as `read_npy` refuses it, or compressed arrays have more than
        UNPACKED bytes.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                check_members(members, os.fstat(file.fileno()).st_size, UNPACKED)
                if other := [one.filename for one in members if not one.filename.endswith(".npy")]:
                    raise ValueError(f"it holds {other[0]!r}, which is no array")
                arrays = {}
                for member in sorted(members, key=lambda one: one.filename):
                    with archive.open(member) as opened:
                        arrays[member.filename.removesuffix(".npy")] = _read(opened, member.file_size)  # type: ignore[arg-type]  # a ZipExtFile
                return arrays
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
            raise ValueError(f"it is not an archive of arrays: {error}") from None


def check_members(members: list[zipfile.ZipInfo], size: int, most: int) -> None:
    """Refuses an archive of `size` bytes that is larger unpacked, by more than `most` bytes, or packed strangely.

    Raises:
      ValueError: the message says why.
    """
    if any(one.flag_bits & 1 or one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for one in members):
        raise ValueError("it is an archive with a password or of an unknown kind")
    unpacked = sum(one.file_size for one in members)
    if unpacked > size + most:
        raise ValueError(f"it has {size:,} bytes, but {unpacked:,} unpacked: save it without compression")


def _read(file: io.BufferedIOBase, size: int) -> np.ndarray:
    """One array; `size` is what the file or the member of an archive has in all."""
    try:
        version = npy.read_magic(file)
        read_head = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read_head is None:
            raise ValueError(f"its version {version} is unknown")
        shape, by_columns, dtype = read_head(file)
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError, TypeError, EOFError) as error:
        raise ValueError(f"its head is damaged ({error})") from None
    if dtype.hasobject or dtype.kind not in "biufcSU":
        raise ValueError(f"it holds values of type {dtype}")
    if not all(0 <= width < 1 << 62 for width in shape):
        raise ValueError(f"its shape is {shape}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != size - file.tell():
        raise ValueError(f"its head says {needed:,} bytes, it has {size - file.tell():,}")
    content = file.read(needed)
    if len(content) != needed:
        raise ValueError("it is cut off")
    flat = np.frombuffer(content, dtype) if needed else np.empty(math.prod(shape), dtype)
    if dtype.kind == "U" and needed and flat.view(dtype.byteorder + "u4").max() > 0x10FFFF:
        raise ValueError("it has characters that do not exist")
    return flat.reshape(shape, order="F" if by_columns else "C")
