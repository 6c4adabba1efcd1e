"""Saving during training, in the background where that is worth it.

A save in the background writes a copy of the state in a thread, while training goes on. What it writes is bitwise what
a save in the foreground writes, and so is what becomes of the run.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.run import arrays, checkpoint
from jaxlm.run.manifest import Loss
from jaxlm.sharding import processes
from jaxlm.training.step import TrainState

WORTH = 0.02
"""Saves go to the background from a save on that took this share of the time since the one before."""

Log = Callable[[], dict[str, Any] | None]


class Saver:
    """Writes the checkpoints of a session, one after the other, as `checkpoint.save` does.

    With `with`: leaving the block waits for the save under way, unless an interrupt leaves it.
    """

    def __init__(self, folder: Path, keep: int, log: Log = lambda: None) -> None:
        """Args: log: what a manifest says of metrics.jsonl, called when a save begins."""
        self.folder, self._keep, self._log = folder, keep, log
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._free_since = time.perf_counter()
        self.background = False
        """Whether the next save goes to the background; never where several processes train together."""

    def save(self, state: TrainState, loss: Loss | None) -> None:
        """Saves a state; in the background, returns when it is copied.

        Raises:
          UserError: this save cannot be written, or the one before could not.
        """
        self.wait()
        log, started = self._log(), time.perf_counter()
        if self.background:
            # A copy, because the next step overwrites the state's arrays.
            copy = jax.tree.map(lambda leaf: np.array(leaf), arrays.plain(state))
            # A daemon, so that a second interrupt ends the process at once; resuming sweeps what it leaves.
            self._thread = threading.Thread(target=self._write, args=(copy, loss, log), name="save", daemon=True)
            self._thread.start()
            return
        checkpoint.save(self.folder, state, loss, self._keep, log)
        ended = time.perf_counter()
        self.background = processes.count() == 1 and ended - started > WORTH * (started - self._free_since)
        self._free_since = ended

    def add_loss(self, step: int, loss: Loss) -> None:
        """Adds the loss of an evaluation to the checkpoint of its step, once that is on disk.

        Raises:
          UserError: it cannot be written, or the save under way could not.
        """
        self.wait()
        checkpoint.add_loss(self.folder, step, loss, self._keep, self._log())

    def _write(self, state: TrainState, loss: Loss | None, log: dict[str, Any] | None) -> None:
        try:
            checkpoint.save(self.folder, state, loss, self._keep, log)
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raises the error of the save in the background, if it has failed already.

        Raises:
          UserError: it could not be written.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when the save under way is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._thread is not None:
            self._thread.join()
