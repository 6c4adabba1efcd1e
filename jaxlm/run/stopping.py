"""Signals that end a training run: the first saves, one more stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
        said = False
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in old and not said:
                    say(f"{signal.Signals(number[0]).name}: saving; once more stops at once")
                    said = True

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
