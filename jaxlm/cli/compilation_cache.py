"""Compiled programs kept on disk: what one call of a command compiles, the next one loads."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


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


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Turns on JAX's persistent compilation cache, for small programs too, and afterwards restores JAX's settings.

    If the folder cannot be created or written, there is a warning and nothing is kept.
    """
    settings: dict[str, object] = {
        "jax_compilation_cache_dir": _create_folder(),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _update(settings)
    try:
        yield
    finally:
        _update(before)


def _create_folder() -> str | None:
    """The cache folder, created if need be; None if nothing is to be kept."""
    folder = "the cache folder"
    try:
        folder = cache_folder()
        if "://" not in folder and folder:  # JAX also takes addresses of cloud storage
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError("it is read-only")
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        warnings.warn(
            f"compiled programs are not kept: {folder} cannot be written ({why}); set JAX_COMPILATION_CACHE_DIR",
            stacklevel=3,
        )
        return None
    return folder or None


def _update(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX would go on with the folder it opened first
