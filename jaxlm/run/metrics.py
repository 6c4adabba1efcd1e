"""What a run says while it trains: rows of metrics.jsonl, and progress on stderr."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from jaxlm.errors import UserError

Row = dict[str, Any]

PLAIN_SECONDS = 5.0
"""Without a terminal, at most one progress line in this many seconds (evaluations always have theirs)."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, oldest first; a last line cut short by a kill is left out.

    Raises:
      UserError: another line is no row; the message names it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"]), "elapsed_s": float(row["elapsed_s"])})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path} line {number} is no row of metrics: mend it, or move the file away") from None
    return rows


class MetricsFile:
    """Appends rows to metrics.jsonl, each on disk before the call returns."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Opens the file and drops rows after `resume_step`, which the run is about to write again."""
        rows = [row for row in read_rows(path) if row["step"] <= resume_step]
        aside = path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        aside.replace(path)
        self.elapsed_s: float = rows[-1]["elapsed_s"] if rows else 0.0
        """Wall time the kept rows account for."""
        self._file = path.open("a", buffering=1)

    def write(self, row: Row) -> None:
        """Adds one JSON object."""
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Progress:
    """A bar on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self._started, self._first, self._last_line = steps, time.perf_counter(), done, 0.0
        self._val = math.nan
        console = rich.console.Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = "{task.completed:.0f}/{task.total:.0f}", "{task.fields[text]}"
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(24),
                *columns,
                rich.progress.TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, text="compiling")
            self._bar.start()

    def update(self, step: int, row: Row | None) -> None:
        """Moves to a step, and shows the row logged there, if any."""
        if row is None:
            if self._bar:
                self._bar.update(self._task, completed=step)
            return
        if "val_loss" in row:
            self._val = row["val_loss"]
        loss = f"loss {row['loss']:.4f}  " if "loss" in row else ""
        val = "" if math.isnan(self._val) else f"val {self._val:.4f}  "
        speed = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else ""
        if self._bar:
            if loss:
                self._bar.update(self._task, completed=step, text=loss + val + speed)
            return
        now = time.perf_counter()
        if "val_loss" in row or step in (1, self.steps) or now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            left = (now - self._started) / max(step - self._first, 1) * (self.steps - step)
            print(f"step {step}/{self.steps}  {loss}{val}{speed}  eta {left:.0f}s", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
