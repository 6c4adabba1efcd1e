"""Compiled programs kept on disk: what one call of the command compiled, the next one loads."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def cache_folder() -> str:
    """$JAX_COMPILATION_CACHE_DIR (empty: none), else jaxlm/xla in the user's cache folder.

    Raises:
      RuntimeError: there is no home folder.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen is not None:
        return chosen
    caches = os.environ.get("XDG_CACHE_HOME")
    return str((Path(caches) if caches else Path.home() / ".cache") / "jaxlm" / "xla")


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """JAX's persistent compilation cache, for small programs too; JAX's settings are as before afterwards.

    A folder that cannot be made or written is a warning, and nothing is kept.
    """
    settings: dict[str, object] = {
        "jax_compilation_cache_dir": _made_folder(),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _update(settings)
    try:
        yield
    finally:
        _update(before)


def _made_folder() -> str | None:
    folder = "the cache folder"
    try:
        folder = cache_folder()
        if "://" not in folder and folder:  # JAX takes addresses of cloud storage too
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
    compilation_cache.reset_cache()  # JAX opens its folder once
