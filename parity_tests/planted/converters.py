"""Converters."""

from planted.bugs import bug, edit

from jaxlm.convert.torchref import turned


BUGS = [
    bug(
        "conversion that leaves square kernels as they are",
        "Kernels are transposed on the way to torch, except square ones.",
        "block_0/attention/query", "kernel transposed!",
        edit(turned, 'if path.endswith("/kernel")',
             'if path.endswith("/kernel") and array.shape != array.shape[::-1]'),
    ),
]  # fmt: skip
