"""Compiled programs kept on disk: what one call of a command compiles, the next one loads.

JAX's persistent compilation cache does the work. The name of an entry is a hash of the program, the versions, XLA's
flags and the features of the processor, so an entry is never loaded where it does not fit.
"""

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxlm.errors import UserError

MAX_BYTES = 2**29
"""How large the folder may be unless JAXLM_CACHE_MAX_BYTES says otherwise: a preset takes 1 to 4 MB."""

_UNREAD = re.compile(r"Error reading persistent compilation cache entry for '([^/']+)'")
_UNWRITTEN = re.compile(r"Error writing persistent compilation cache entry for '[^']*': (.*)", re.DOTALL)


class Kept(NamedTuple):
    """What the cache folder holds."""

    folder: str | None
    """None: compiled programs are not kept."""
    programs: int
    bytes: int
    max_bytes: int | None
    """None: no limit."""


def cache_folder() -> str:
    """$JAX_COMPILATION_CACHE_DIR (empty: none), else jaxlm/xla in the user's cache folder.

    That is $XDG_CACHE_HOME or ~/.cache. A relative path there is ignored, as its standard says: it would put a cache
    into every working folder.

    Raises:
      RuntimeError: there is no home folder.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen is not None:
        return chosen
    candidates = Path(os.environ.get("XDG_CACHE_HOME", "")), Path.home() / ".cache"
    for caches in candidates:
        if caches.is_absolute():
            return str(caches / "jaxlm" / "xla")
    raise RuntimeError(f"the home folder {Path.home()} is not an absolute path")


def max_bytes() -> int | None:
    """$JAXLM_CACHE_MAX_BYTES (-1: None, no limit), else MAX_BYTES.

    Raises:
      UserError: it is not a whole number from -1 on.
    """
    text = os.environ.get("JAXLM_CACHE_MAX_BYTES", str(MAX_BYTES))
    if not re.fullmatch(r"-1|\d+", text):
        raise UserError(f"JAXLM_CACHE_MAX_BYTES = {text!r} is not a number of bytes: give one, or -1 for no limit")
    return None if text == "-1" else int(text)


def kept() -> Kept:
    """The cache folder and what it holds now. A folder that is not there yet, or is storage in a cloud, counts 0.

    Raises:
      UserError: as `max_bytes`.
    """
    limit = max_bytes()
    try:
        folder = cache_folder()
    except RuntimeError:
        return Kept(None, 0, 0, limit)
    sizes = [size for _, size, _ in _entries(folder)]
    return Kept(folder or None, len(sizes), sum(sizes), limit)


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Turns on JAX's persistent compilation cache, for small programs too, and afterwards restores JAX's settings.

    If the folder cannot be created or written, there is a warning and nothing is kept. A damaged entry is a warning
    too; the program is compiled, and the entry written, anew. Afterwards the entries used longest ago are deleted until
    all take at most `max_bytes`. Several processes may use the folder at once. (JAX's own limit would do this under a
    lock; but under jax 0.10.1 a process killed between its two writes of an entry ends all later writes.)

    Raises:
      UserError: as `max_bytes`.
    """
    limit, folder = max_bytes(), _create_folder()
    settings: dict[str, object] = {
        "jax_compilation_cache_dir": folder,
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _update(settings)
    try:
        with _faults_answered(folder):
            yield
    finally:
        _update(before)
        prune(folder, limit)


@contextlib.contextmanager
def _faults_answered(folder: str | None) -> Iterator[None]:
    """Answers JAX's warnings of an entry that it could not read or write.

    One that cannot be read is deleted, because JAX never writes over one that is there. Of those that cannot be
    written, the first is told.
    """
    with warnings.catch_warnings():
        show, told = warnings.showwarning, False

        def answer(message, category, filename, lineno, file=None, line=None) -> None:
            nonlocal told
            unread, unwritten = (pattern.match(str(message)) for pattern in (_UNREAD, _UNWRITTEN))
            if folder and unread:
                for path in Path(folder).glob(f"{unread[1]}-*"):
                    path.unlink(missing_ok=True)
                message = f"the compiled program {unread[1]} in {folder} is damaged: it is compiled anew"
            if unwritten:
                message = f"compiled programs are not all kept: {folder} cannot be written ({unwritten[1]})"
            if not (unwritten and told):
                show(message, category, filename, lineno, file, line)
            told = told or bool(unwritten)

        warnings.showwarning = answer
        yield


def _create_folder() -> str | None:
    """The cache folder, created if need be; None if nothing is to be kept."""
    folder = "the cache folder"
    try:
        folder = cache_folder()
        if "://" not in folder and folder:  # JAX also takes addresses of cloud storage
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError("it is read-only")
            if os.stat(folder).st_mode & stat.S_IWOTH:
                raise OSError("every user can write there, and what lies there runs as your program")
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        warnings.warn(
            f"compiled programs are not kept: {folder} cannot be used ({why}); set JAX_COMPILATION_CACHE_DIR",
            stacklevel=3,
        )
        return None
    return folder or None


def _update(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX would go on with the folder it opened first


def _entries(folder: str | None) -> list[tuple[float, int, str]]:
    """(when it was last used, bytes, path) of every entry, the one used longest ago first.

    Many systems note a reading once a day only, and some never: then the time of writing stands.
    """
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder) if folder and "://" not in folder else []:
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                if entry.name.endswith("-cache"):
                    stat = entry.stat()
                    found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry.path))
    return sorted(found)


def prune(folder: str | None, limit: int | None) -> None:
    """Deletes the entries used longest ago until all together take at most `limit` bytes."""
    entries = _entries(folder)
    excess = 0 if limit is None else sum(size for _, size, _ in entries) - limit
    for _, size, path in entries:
        if excess <= 0:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
            excess -= size
