"""The lock of a run folder: one process at a time trains there. It ends with the process, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.files import remove, unwritable
from jaxlm.data.reading import parse_json
from jaxlm.errors import UserError
from jaxlm.run.own_files import check_own
from jaxlm.sharding import processes

NAME = ".lock"
"""JSON of the holder, {"host", "pid", "started"}; what counts is not the file but the lock on it (`fcntl.flock`)."""


FIX = "training writes into the run; copy it to a place that can be written"
"""What to do about the folder of a run that cannot be written."""


@contextlib.contextmanager
def held(folder: Path, fix: str = FIX) -> Iterator[None]:
    """Holds the lock of a folder that exists, then removes its file. That of a killed process is taken over.

    Args:
      fix: what the message tells the user to do where the folder cannot be written.

    Raises:
      UserError: another process holds it (the line names that one), the folder cannot be written, or one of the names
        that a run writes is a link (`check_own`).
    """
    check_own(folder)
    opened = _acquire(folder, fix)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a file that stays locks nothing
            (folder / NAME).unlink(missing_ok=True)
        os.close(opened)


@contextlib.contextmanager
def for_training(out: Path) -> Iterator[None]:
    """Holds the lock of a run while it is trained, and begins by sweeping; process 0 does that for all."""
    if not processes.first():
        yield
        return
    with held(out):
        sweep(out)
        yield


def sweep(folder: Path) -> None:
    """Removes what killed processes left half written in a run folder; only for the holder of its lock."""
    for place in (folder, folder / "checkpoints", folder / "samples"):
        for killed in place.glob(".*.partial"):
            try:
                remove(killed)
            except OSError as error:
                raise _refusal(killed, error) from None


def sweep_beginnings(out: Path) -> None:
    """Removes what killed processes left beside `out` of new runs of this name; those being written are locked."""
    for staging in out.absolute().parent.glob(f".{_literal(out.name)}.*.partial"):
        if staging.is_dir():
            with contextlib.suppress(UserError, OSError), held(staging):
                remove(staging)


def _literal(name: str) -> str:
    """A pattern for a name that may hold the signs of patterns."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _acquire(folder: Path, fix: str) -> int:
    """The descriptor of the locked file."""
    while True:
        opened = None
        try:
            opened = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            _lock(opened, folder)
            if _is_there(opened, folder / NAME):
                me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(opened, 0)
                os.pwrite(opened, json.dumps(me).encode(), 0)
                return opened
            os.close(opened)
        except (OSError, UserError) as error:
            if opened is not None:
                os.close(opened)
            raise (_refusal(folder, error, fix) if isinstance(error, OSError) else error) from None


def _is_there(opened: int, file: Path) -> bool:
    """Whether the locked file still has its name. A holder removes it when it is done, and then it locks nothing."""
    try:
        return os.path.samestat(os.fstat(opened), file.stat())
    except FileNotFoundError:
        return False


def _lock(opened: int, folder: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use: {_holder(opened)} trains it; wait for that process, or stop it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warnings.warn(
            f"{folder} lies on a file system without locks ({error.strerror}): let no second process train it",
            stacklevel=2,
        )


def _holder(opened: int) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        content = parse_json(os.pread(opened, 4096, 0).decode())
        return f"process {int(content['pid'])} on {str(content['host'])!r} since {content['started']!s}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _refusal(folder: Path, error: OSError, fix: str = FIX) -> UserError:
    return unwritable(folder, error, "free some space", fix)
