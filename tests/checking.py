"""The run-time type checker of the tests: jaxtyping's shapes through beartype, an int standing for a float."""

import importlib
import os

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Checks every annotated signature of jaxlm but the configs, which check themselves.

    Must be called before anything else imports jaxlm.
    """
    # As the command does (jaxlm/cli/main.py). JAX would set 1 for the commands that tests start, whose log then fills
    # a pipe that nobody reads.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    importlib.import_module("jaxlm.config")
    install_import_hook("jaxlm", "checking.check")
