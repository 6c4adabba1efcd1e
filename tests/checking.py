"""What all tests run with: checks of every signature and compiled programs that all processes share."""

import gc
import importlib
import os
from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PROGRAMS = str(Path(__file__).parent.parent / ".pytest_cache" / "programs")
"""Where compiled programs are kept, in place of the user's own folder. The next run of the tests finds them."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""jaxtyping's shapes through beartype, an int standing for a float."""


def install() -> None:
    """Checks every annotated signature of jaxlm but the configs, which check themselves, and keeps compiled programs.

    Must be called before anything else imports jaxlm.
    """
    # As the command does (jaxlm/cli/main.py). JAX would set 1 for the commands that tests start, whose log then fills
    # a pipe that nobody reads.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before jax is imported
    gc.set_threshold(100_000, 20, 100)  # tracing makes many small objects; the usual 700 takes a tenth of the time
    settings = importlib.import_module("jax").config
    settings.update("jax_compilation_cache_dir", PROGRAMS)  # most of the tests' time goes into compiling
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    importlib.import_module("jaxlm.config")
    install_import_hook("jaxlm", "checking.check")


def is_left_out(path: Path, expression: str) -> bool:
    """Whether `-m expression` leaves out all tests of a file, so that it need not be imported."""
    return path.name.startswith("test_") and expression.startswith("not x64" if path.stem.endswith("_x64") else "x64")
