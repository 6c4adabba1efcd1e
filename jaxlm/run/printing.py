"""Standard streams that a program outlives: who no longer reads them ends the printing, not the work."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

GONE = {errno.EPIPE, errno.EIO, errno.ESHUTDOWN}
"""Nobody reads any more: a pipe that was closed, a terminal that was hung up."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The disk is full."""

UNWRITABLE = {errno.EBADF}
"""The stream is open, but not for writing, as with 2</dev/null."""


class _Outlived(io.FileIO):
    """A file descriptor that drops what cannot be written for one of some reasons."""

    def __init__(self, descriptor: int, name: str, reasons: set[int]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name, self._reasons = name, reasons

    def write(self, data, /):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._reasons:
                raise
            return memoryview(data).nbytes


@contextlib.contextmanager
def outlived(*, stdout: bool = False) -> Iterator[None]:
    """In the block, a stderr that cannot be written drops what is printed. So does stdout, once nobody reads it.

    What prints may look streams up in `sys` as usual: print, warnings, rich. Streams that somebody has put in the place
    of the process's own, as notebooks and test runners do, stay as they are.

    Args:
      stdout: whether stdout too is outlived. A full disk under it still raises: then a result is lost.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_outlived("stderr", GONE | FULL | UNWRITABLE))
        if stdout:
            stack.enter_context(_outlived("stdout", GONE))
        yield


@contextlib.contextmanager
def _outlived(name: str, reasons: set[int]) -> Iterator[None]:
    old = getattr(sys, name)
    if old is None:  # closed before the program started; print(file=None) would write to stdout
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            setattr(sys, name, nowhere)
            try:
                yield
            finally:
                setattr(sys, name, None)
        return
    is_own = old is getattr(sys, f"__{name}__") and isinstance(old, io.TextIOWrapper)
    if not is_own or not isinstance(getattr(old.buffer, "raw", old.buffer), io.FileIO):
        yield
        return
    raw = _Outlived(old.fileno(), f"<{name}>", reasons)
    with contextlib.suppress(BrokenPipeError):
        old.flush()
    buffer: Any = raw if isinstance(old.buffer, io.FileIO) else io.BufferedWriter(raw)  # PYTHONUNBUFFERED has no buffer
    kept = {"line_buffering": old.line_buffering, "write_through": old.write_through}
    new = io.TextIOWrapper(buffer, old.encoding, old.errors, **kept)
    setattr(sys, name, new)
    try:
        yield
    finally:
        setattr(sys, name, old)
        new.flush()
