"""The file metrics.jsonl of a run: one JSON object a line, in the order of the steps.

There are two kinds of rows. A training row is written every `train.log_every` steps, and for step 1 and the last step.
An evaluation row is written every `train.eval_every` steps and for the last step.

    field          unit             rows        meaning
    step           optimizer steps  all         steps taken so far
    elapsed_s      seconds          all         wall time of training so far, in all sessions of the run together
    loss           nats per token   training    of the batch of this step, before its update [1]
    lr             1                training    learning rate of this step [1]
    grad_norm      1                training    global norm of the gradient before clipping [1]
    tokens_per_s   tokens / second  training    targets trained on since the row before, over the time it took
    mfu            1                training    model FLOPs utilisation: share of the device's known peak [3]
    gflops_per_s   10^9 FLOP / s    training    of all devices together, where the peak is not known [3]
    skipped        optimizer steps  training    steps skipped so far because their gradient was not finite [2]
    val_loss       nats per token   evaluation  mean over every target of the validation split
    train_loss     nats per token   evaluation  the same over the start of the training split, of equal length
    perplexity     1                evaluation  exp(val_loss)
    bits_per_byte  bits per byte    evaluation  the val_loss of all targets in bits, over the UTF-8 bytes of their text
    eval_batches   batches          evaluation  of an estimate (train.eval_batches): batches that it comes from [2]

[1] Not in the row of a step that was skipped. [2] Only if there are any. [3] Of the products of the forward pass, three
times, without what is computed again (model.remat); none if the model has no products.
"""

import hashlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

from jaxlm.data.files import unwritable
from jaxlm.data.reading import read_regular
from jaxlm.errors import UserError

Row = dict[str, Any]

OF_CLOCKS = ("elapsed_s", "tokens_per_s", "mfu", "gflops_per_s")
"""Fields that a clock decides: they differ when the same run is trained again."""

NUMBERS = (
    *("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "gflops_per_s", "skipped"),
    *("val_loss", "train_loss", "perplexity", "bits_per_byte", "eval_batches"),
)
"""The fields that hold a number wherever they stand."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, oldest first; a last line cut short by a kill is left out.

    Raises:
      UserError: it cannot be read, or another line is not a row; the message names it.
    """
    try:
        lines = read_regular(path).decode(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise _unreadable(path, error) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row = {**row, "step": int(row["step"]), "elapsed_s": float(row["elapsed_s"])}
            if not all(isinstance(row.get(name), float | int | None) for name in NUMBERS):
                raise ValueError
            rows.append(row)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if number < len(lines):
                raise UserError(
                    f"{path} line {number} is not a row of metrics: correct it, or move the file away"
                ) from None
    return rows


def check_log(path: Path, entry: dict[str, Any] | None) -> None:
    """Compares the start of a metrics.jsonl with what the manifest of a checkpoint says of it.

    Args:
      entry: {"bytes", "sha256"} as `MetricsFile.entry` gives it; None = an older version saved the checkpoint.

    Raises:
      UserError: a row up to the checkpoint has changed or is missing. A file that is not there at all is a warning.
    """
    if entry is None:
        return
    if not path.exists():
        warnings.warn(f"{path} is missing: the rows of the sessions before this one are lost", stacklevel=3)
        return
    try:
        content = read_regular(path)[: entry["bytes"]]
    except OSError as error:
        raise _unreadable(path, error) from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(
            f"{path} was changed after it was written (its sha256 is another): put the old one back, or move it away"
        )


class MetricsFile:
    """Appends rows to metrics.jsonl, each written before the call returns."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Opens the file and drops rows after `resume_step`, which the run is about to write again.

        Raises:
          UserError: the file cannot be written.
        """
        rows = [row for row in read_rows(path) if row["step"] <= resume_step]
        earlier = rows[-1]["elapsed_s"] if rows else 0.0  # by the sessions before this one
        self._started = time.perf_counter() - earlier
        try:
            # Steps rise from row to row, so what is dropped is the end. Cutting it off needs no space.
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)[: len(rows)]
            self._file.truncate(sum(map(len, lines)))
        except OSError as error:
            raise _unwritable(path, error) from None

    def write(self, row: Row) -> Row:
        """Adds a row, with the time that has elapsed, and returns it.

        Raises:
          UserError: the file cannot be written.
        """
        row = {**row, "elapsed_s": round(time.perf_counter() - self._started, 3)}
        try:
            self._file.write((json.dumps(row) + "\n").encode())
        except OSError as error:
            raise _unwritable(Path(self._file.name), error) from None
        return row

    def entry(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says of the file, which is on disk when this returns: {"bytes", "sha256"}.

        Raises:
          UserError: the file cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
            self._file.seek(0)
            content = self._file.read()
        except OSError as error:
            raise _unwritable(Path(self._file.name), error) from None
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): put the old one back, or move it away")


def _unwritable(path: Path, error: OSError) -> UserError:
    return unwritable(path, error, "free some space, and go on with --resume")


class NoMetricsFile:
    """Stands for the file in the processes that do not write it."""

    def write(self, row: Row) -> Row:
        """Returns the row as it is."""
        return row

    def entry(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Does nothing."""
