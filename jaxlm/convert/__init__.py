"""Parameters from and to elsewhere: a converter gives the same function, or refuses by name and value."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.convert.hf import from_hf as from_hf
    from jaxlm.convert.nanogpt import from_nanogpt as from_nanogpt
    from jaxlm.convert.torchref import from_torchref as from_torchref
    from jaxlm.convert.torchref import to_torchref as to_torchref

_HOME = {"from_hf": "hf", "from_nanogpt": "nanogpt", "from_torchref": "torchref", "to_torchref": "torchref"}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"jaxlm.convert.{_HOME[name]}"), name)
    raise AttributeError(f"module 'jaxlm.convert' has no attribute {name!r}")
