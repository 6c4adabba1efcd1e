"""Parameters from and to other frameworks."""

from jaxlm.convert.torchref import from_torchref, to_torchref

__all__ = ["from_torchref", "to_torchref"]
