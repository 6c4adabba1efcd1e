"""Calls readers with damaged files: they may only succeed or refuse, in bounded time and memory, and write nothing.

`try_bytes` gives one file of a fresh copy of a target's files other content, calls the reader and checks what it did:
success, UserError or CheckError; nothing written outside; memory and time bounded.
"""

import contextlib
import functools
import importlib
import io
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from fuzz_targets import TARGETS

from jaxlm.errors import CheckError, UserError

SLACK = 96 << 20
"""Bytes beyond twice the file: modules that are imported late, buffers of libraries, compiled programs."""
ROOM = 3 << 30
"""Addresses a reader may take beyond what the process has: what declares terabytes must not get them."""
SECONDS = 20.0
"""Of the processor; one input takes milliseconds, and those that trace a model a second."""
WAIT = 100.0
"""By the clock."""


class FindingError(AssertionError):
    """A reader did what no reader may do."""


class TooSlow(BaseException):
    """The watchdog's."""


@functools.cache
def seeds(name: str) -> tuple[Path, tuple[str, ...]]:
    """The folder of a target's valid files, and the paths of those that are damaged; made once a process."""
    folder = Path(tempfile.mkdtemp(prefix=f"seeds-{name}-"))
    TARGETS[name].make(folder)
    with contextlib.suppress(ImportError):  # an index may name a file of any kind
        importlib.import_module("torch")
    if (outcome := _outcome(TARGETS[name].read, folder)) != "read":  # it also imports what the reader needs
        raise FindingError(f"valid files are refused: {outcome}")
    files = {path for pattern in TARGETS[name].damaged for path in folder.glob(pattern) if path.is_file()}
    return folder, tuple(sorted(str(path.relative_to(folder)) for path in files))


def try_bytes(name: str, file: str, content: bytes) -> str:
    """Reads a target whose `file` has this content; returns "read" or the message of the refusal.

    Raises:
      FindingError: another exception, or the reader broke a bound.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as outer:
        folder = Path(outer) / "in"
        shutil.copytree(seeds(name)[0], folder, symlinks=True)
        (folder / file).write_bytes(content)
        with _bounded(len(content)):
            outcome = _outcome(TARGETS[name].read, folder)
        if left := [path.name for path in Path(outer).iterdir() if path.name != "in"]:
            raise FindingError(f"wrote {left[0]!r} outside the folder")
        return outcome


def _outcome(read: Callable[[Path], object], folder: Path) -> str:
    quiet = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        try:
            read(folder)
        except (UserError, CheckError) as error:
            return str(error)
    return "read"


@contextlib.contextmanager
def _bounded(size: int):
    """Refuses more memory than twice the file and SLACK, and more time than SECONDS."""

    def too_slow(number, frame):
        raise TooSlow

    before = _resident("VmRSS")
    addresses, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_resident("VmSize") + ROOM, hard))
    # Of the processor, which others use too; what waits for ever uses none, so the clock is watched as well.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, WAIT)}
    handlers = {number: signal.signal(number, too_slow) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    try:
        yield
    except TooSlow:
        raise FindingError(f"took more than {SECONDS:.0f} s of the processor, or waited {WAIT:.0f} s") from None
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, (addresses, hard))
    taken = _resident("VmHWM") - before
    if taken > 2 * size + SLACK:
        raise FindingError(f"took {taken >> 20} MiB for a file of {size} bytes")


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)
