"""stdin and stdout as a command may use them: never None, and no traceback for what cannot be read or written."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class OutputError(Exception):
    """stdout cannot be written: a full disk, a closed file. A pipe that nobody reads stays a BrokenPipeError."""


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """In the block, sys.stdin and sys.stdout are open, whatever the command was started with.

    Characters that the locale lacks are replaced, and what cannot be written to stdout raises OutputError. A stream
    that the command was started without (>&-, <&-) is as one that cannot be written or read, and takes up its number:
    no file that is opened later gets it together with what the compiler's libraries print there.

    A stdout that is no file, as in a test or a notebook, stays as it is. `outlived` does the same for stderr.
    """
    before = sys.stdin, sys.stdout
    stdin, stdout = _opened(before[0], os.O_WRONLY), _opened(before[1], os.O_RDONLY)
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="replace")
        stdout = _Output(stdout)
    sys.stdin, sys.stdout = stdin, stdout
    try:
        yield
    finally:
        sys.stdin, sys.stdout = before


def drop_output() -> None:
    """Sends what stdout has buffered, and all that follows, nowhere: at its end the interpreter flushes it again."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file has nothing to flush
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class _Output:
    """A text stream whose failures are those of stdout, not of some other file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text.

        Raises:
          OutputError: it cannot be written.
        """
        with _told():
            return self._stream.write(text)

    def flush(self) -> None:
        """Writes what is buffered.

        Raises:
          OutputError: it cannot be written.
        """
        with _told():
            self._stream.flush()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written ({error.strerror})") from None


def _opened(stream: Any, flags: int) -> Any:
    """The stream; where there is none, one on the lowest free number, its own, that works in the wrong direction only.

    A program that was started with a stream closed would give that number to the next file that it opens.
    """
    if stream is not None:
        return stream
    number = os.open(os.devnull, flags)
    return open(number, "r" if flags == os.O_WRONLY else "w", encoding="utf-8", closefd=False)
