"""Converts parameters from and to other formats. A converter either keeps the function or refuses by name and value.

Names are imported when they are first used.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from jaxlm.convert.export import to_hf as to_hf
    from jaxlm.convert.hf import from_hf as from_hf
    from jaxlm.convert.llama2c import from_llama2c as from_llama2c
    from jaxlm.convert.meta import from_meta as from_meta
    from jaxlm.convert.nanogpt import from_nanogpt as from_nanogpt
    from jaxlm.convert.nanogpt import to_nanogpt as to_nanogpt
    from jaxlm.convert.torchref import from_torchref as from_torchref
    from jaxlm.convert.torchref import to_torchref as to_torchref
    from jaxlm.convert.torchref_files import load_torchref as load_torchref
    from jaxlm.convert.torchref_files import save_torchref as save_torchref

__all__ = [
    *("from_hf", "from_llama2c", "from_meta", "from_nanogpt", "from_torchref", "load_torchref"),
    *("save_torchref", "to_hf", "to_nanogpt", "to_torchref"),
]


def __dir__() -> list[str]:
    return __all__
