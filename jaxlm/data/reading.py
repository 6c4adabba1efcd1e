"""Files that others wrote, read with bounds: regular files only, and JSON without what JSON does not have."""

import errno
import io
import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

DEEPEST = 64
"""Lists and objects inside one another in a JSON file; tokenizer.json has about 8."""

TOO_DEEP = f"lists or objects are nested deeper than {DEEPEST}"
"""What a refusal says of it."""

LARGEST = 1 << 28
"""Bytes of a JSON file that is read at once; the largest tokenizer.json of well-known models has 35 MB."""

_SMALL = {"config.json", "generation_config.json", "params.json"}


def largest(name: str) -> int:
    """Bytes of a JSON file of this name that are read at once: its objects take up to 40 times as many in memory."""
    if name in _SMALL:
        return 1 << 22
    return 1 << 24 if name == "manifest.json" or name.endswith(".index.json") else LARGEST


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file for reading, in bytes. A pipe or device would make the reader wait, or never end.

    Raises:
      OSError: it cannot be opened, or is no regular file (a link to one is).
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
      most: a larger file is refused.

    Raises:
      OSError: as `open_regular`, or the file is too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {most:,}", str(path))
        return file.read()


def read_json(path: Path) -> Any:
    """What a JSON file holds, if it has at most `largest` bytes.

    Raises:
      OSError: as `read_regular`.
      ValueError: as `parse_json`, or it is not UTF-8.
    """
    return parse_json(read_regular(path, largest(path.name)).decode())


def parse_json(text: str) -> Any:
    """What a JSON text says; nothing beyond the standard (RFC 8259) is accepted, and nothing that two readers may
    understand in two ways.

    Raises:
      ValueError: not JSON; a key that an object has twice; NaN or a number out of range; half a surrogate pair;
        deeper than DEEPEST.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    check_depth(value)
    if _HALVES.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half a surrogate pair") from None
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
      OSError: as `read_regular`.
      ValueError: it is not TOML, or not UTF-8.
    """
    try:
        return tomllib.loads(read_regular(path, LARGEST).decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_HALVES = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} stands there twice in one object")
    return found


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _int(text: str) -> int:
    if len(text) > 20:  # 64 bits have 19 digits and a sign
        raise ValueError(f"the number {text[:20]}... has {len(text)} digits")
    return int(text)


def check_depth(value: Any) -> None:
    """Goes through lists and objects level by level, so that nothing later has to recurse deeply.

    Raises:
      ValueError: they are nested deeper than DEEPEST.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        if not level:
            return
        inside = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inside if isinstance(child, dict | list)]
    if level:
        raise ValueError(TOO_DEEP)
