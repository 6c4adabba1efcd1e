"""Files that may be compressed, read as what they hold."""

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.reading import open_regular
from jaxlm.errors import UserError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""What the name of a compressed file ends with, in any case."""


def is_compressed(path: Path) -> bool:
    """Whether the name of a file says that it is compressed."""
    return path.suffix.lower() in SUFFIXES


def plain_suffix(path: Path) -> str:
    """What a file holds by its name, in lower case: .txt for a.txt and for A.TXT.gz."""
    return Path(path.stem if is_compressed(path) else path.name).suffix.lower()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Opens a file to read the bytes that it holds, decompressed if its name ends with one of SUFFIXES.

    Raises:
      UserError: the compressed bytes are damaged or cut off, or .zst on a Python without it (before 3.14).
      OSError: it cannot be read.
    """
    suffix = path.suffix.lower() if is_compressed(path) else ""
    modules: dict[str, Any] = {"": None, ".gz": gzip, ".bz2": bz2, ".xz": lzma}
    if suffix == ".zst":
        try:
            modules[suffix] = importlib.import_module("compression.zstd")
        except ImportError:
            raise UserError(f"{path} needs Python 3.14 to be read: decompress it first (zstd -d {path})") from None
    damaged: list[type[Exception]] = [gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError]
    if suffix == ".zst":
        damaged.append(modules[suffix].ZstdError)
    with open_regular(path) as raw:
        if not suffix:
            yield raw
            return
        try:
            with modules[suffix].open(raw) as file:
                yield file
        except tuple(damaged) as error:
            raise UserError(f"{path} is not a whole {suffix} file ({error}): restore it, or leave it out") from None
        except OSError as error:
            if error.errno is not None:
                raise
            # bz2 says so without a number.
            raise UserError(f"{path} is not a whole {suffix} file ({error}): restore it, or leave it out") from None


def num_bytes(path: Path) -> int:
    """Bytes that a file holds; a compressed one is read for it.

    Raises:
      UserError, OSError: as `opened`.
    """
    if not is_compressed(path):
        return path.stat().st_size
    with opened(path) as file:
        return sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
