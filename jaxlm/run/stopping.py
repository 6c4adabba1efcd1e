"""Signals that end a training run: the first saves, one more stops at once."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE = 2.0
"""So many seconds after the second signal the process ends, if Python has not come to the old handler before."""


def _is_interactive() -> bool:
    """Whether this process is a session of a user, who would lose more than the run."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


@contextlib.contextmanager
def collected(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Collects the numbers of SIGINT, SIGTERM and SIGHUP instead of ending at once. One more meets the old handlers.

    A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread nothing is changed: only there may
    handlers be set.

    Args:
      say: shows a line; called from another thread, so that it is there at once, whatever the main thread computes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    found = {signum: signal.getsignal(signum) for signum in SIGNALS}
    if found[signal.SIGHUP] is signal.SIG_IGN:
        del found[signal.SIGHUP]
    old = {signum: handler for signum, handler in found.items() if handler is not None}  # None: it is not Python's

    def restore() -> None:
        for signum, handler in old.items():
            signal.signal(signum, handler)

    def note(signum, frame):
        received.append(signum)
        restore()

    # Python runs a handler only between two of its own instructions, and a compilation or an evaluation may be one of
    # them. The interpreter writes the number of a signal to a descriptor at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def tell() -> None:
        count = 0
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):  # b"" when the block has ended
                count += number[0] in old
                if number[0] in old and count == 1:
                    say(f"{signal.Signals(number[0]).name}: saving; once more stops at once")
                elif count > 1 and not _is_interactive() and not select.select([reader], [], [], GRACE)[0]:
                    os._exit(128 + number[0])

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in old:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        restore()
        signal.set_wakeup_fd(before)
        os.close(writer)
        teller.join()
