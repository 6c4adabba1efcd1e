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
    skipped        optimizer steps  training    steps skipped so far because their gradient was not finite [2]
    val_loss       nats per token   evaluation  mean over every target of the validation split
    train_loss     nats per token   evaluation  the same over the start of the training split, of equal length
    perplexity     1                evaluation  exp(val_loss)
    bits_per_byte  bits per byte    evaluation  the val_loss of all targets in bits, over the UTF-8 bytes of their text

[1] Not in the row of a step that was skipped. [2] Only if there are any, and optim.max_nonfinite allows it.
"""

import json
import time
from pathlib import Path
from typing import Any

from jaxlm.data.files import staged
from jaxlm.data.reading import read_regular
from jaxlm.errors import UserError

Row = dict[str, Any]

NUMBERS = "loss", "lr", "grad_norm", "tokens_per_s", "skipped", "val_loss", "train_loss", "perplexity", "bits_per_byte"
"""The fields that hold a number wherever they stand."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, oldest first; a last line cut short by a kill is left out.

    Raises:
      UserError: another line is not a row; the message names it.
    """
    try:
        lines = read_regular(path).decode(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): move it away") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"]), "elapsed_s": float(row["elapsed_s"])})
            if not all(isinstance(row.get(name), float | int | None) for name in NUMBERS):
                raise ValueError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if number < len(lines):
                raise UserError(
                    f"{path} line {number} is not a row of metrics: correct it, or move the file away"
                ) from None
    return rows


class MetricsFile:
    """Appends rows to metrics.jsonl, each on disk before the call returns."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Opens the file and drops rows after `resume_step`, which the run is about to write again."""
        rows = [row for row in read_rows(path) if row["step"] <= resume_step]
        with staged(path) as staging:
            staging.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        earlier = rows[-1]["elapsed_s"] if rows else 0.0  # by the sessions before this one
        self._started = time.perf_counter() - earlier
        self._file = path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Adds a row, with the time that has elapsed.

        Raises:
          UserError: the file cannot be written.
        """
        elapsed_s = round(time.perf_counter() - self._started, 3)
        try:
            self._file.write((json.dumps({**row, "elapsed_s": elapsed_s}) + "\n").encode())
        except OSError as error:
            raise UserError(f"{self._file.name} cannot be written ({error.strerror}): free some space") from None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoMetricsFile:
    """Stands for the file in the processes that do not write it."""

    def write(self, row: Row) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
