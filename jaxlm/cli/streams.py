"""stdin, stdout and stderr as a command may use them: never None, never a traceback for what cannot be written."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class OutputError(Exception):
    """stdout cannot be written: a full disk, a closed file. A pipe that nobody reads stays a BrokenPipeError."""


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """In the block, sys.stdin, sys.stdout and sys.stderr are open, whatever the command was started with.

    Characters that a locale lacks are replaced. What cannot be written to stdout raises OutputError; what cannot be
    written to stderr is dropped, because messages must not end the work that they are about. A stream that the command
    was started without (>&-) is as one that cannot be read or written, and its number is taken, so that no file that is
    opened later gets it together with what the compiler's libraries print there.

    Streams that are not files (those of a test or a notebook) stay as they are.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    stdin = _opened(before[0], os.O_WRONLY)
    stdout, stderr = (_opened(stream, os.O_RDONLY) for stream in before[1:])
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="replace")
        stdout = _Output(stdout)
    if isinstance(stderr, io.TextIOWrapper):
        stderr.reconfigure(errors="backslashreplace")
        stderr = _Messages(stderr)
    sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def drop_output() -> None:
    """Sends what stdout has buffered, and all that follows, nowhere: at its end the interpreter flushes it again."""
    _discard(sys.stdout)


class _Stream:
    """A text stream of which subclasses change what happens when a write fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def writelines(self, lines: Any) -> None:
        """Writes each."""
        for line in lines:
            self.write(line)

    def write(self, text: str) -> int:
        """Writes the text, or does what `_failed` does."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Flushes, or does what `_failed` does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        raise NotImplementedError


class _Output(_Stream):
    def _failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise OutputError(f"stdout cannot be written ({error.strerror})") from None


class _Messages(_Stream):
    def _failed(self, error: OSError) -> None:
        _discard(self._stream)


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream without a file has nothing to flush
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _opened(stream: Any, flags: int) -> Any:
    """The stream; where there is none, one on the lowest free number, its own, that works in the wrong direction only.

    A program that was started with a stream closed would give that number to the next file that it opens.
    """
    if stream is not None:
        return stream
    number = os.open(os.devnull, flags)
    return open(number, "r" if flags == os.O_WRONLY else "w", encoding="utf-8", closefd=False)
