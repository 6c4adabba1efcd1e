"""The progress of a training run: a bar on a terminal, a line that changes in a notebook, else plain lines."""

import math
import sys
import time
from typing import Any

import rich.console
import rich.progress

from jaxlm.config import TrainConfig
from jaxlm.run.metrics import Row
from jaxlm.terminal import printable

CELL_SECONDS = 0.5
"""So many lie between two changes of the line in a notebook."""

PLAIN_SECONDS = 5.0
"""Without a bar, at least so many seconds lie between two progress lines (evaluations always have theirs)."""


class Clock:
    """How long the rest of a run will take, from the steps and evaluations of this session.

    The first chunk is not counted, because compiling is most of it.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self._cfg = cfg
        self._chunks, self._steps, self._seconds = 0, 0, 0.0
        self.eval_seconds: float | None = None
        """How long the last evaluation took; None before the first."""

    def add_chunk(self, steps: int, seconds: float) -> None:
        """Counts a chunk of training steps."""
        self._chunks += 1
        if self._chunks > 1:
            self._steps, self._seconds = self._steps + steps, self._seconds + seconds

    def remaining(self, step: int) -> float | None:
        """Seconds from a step to the end; None before the second chunk, and at the last step."""
        left = self._cfg.steps - step
        if not self._steps or left <= 0:
            return None
        evaluations = math.ceil(self._cfg.steps / self._cfg.eval_every) - step // self._cfg.eval_every
        return left * self._seconds / self._steps + evaluations * (self.eval_seconds or 0.0)


class Progress:
    """Shows where a run is."""

    def __init__(self, cfg: TrainConfig, done: int, shown: bool = True) -> None:
        """Args: done: steps before this session. shown: whether anything is printed."""
        self.clock = Clock(cfg)
        self._steps, self._shown = cfg.steps, shown
        self._last_line = 0.0
        self._loss = self._val = self._speed = ""
        self._bar = self._cell = None
        console = rich.console.Console(stderr=True)
        if shown and console.is_terminal and not console.is_dumb_terminal:
            columns = "{task.completed:.0f}/{task.total:.0f}", "{task.fields[text]}"
            self._bar = rich.progress.Progress(rich.progress.BarColumn(24), *columns, console=console)
            self._task = self._bar.add_task("train", total=cfg.steps, completed=done, text="compiling")
            self._bar.start()
        elif shown and console.is_jupyter:
            self._cell = NotebookLine()

    def move(self, step: int) -> None:
        """Training has come to a step, which has no row."""
        if self._bar:
            self._bar.update(self._task, completed=step, text=self._text(step))
        elif self._cell and self._line_is_due():
            self._line(step, self._text(step))

    def show(self, row: Row) -> None:
        """Training has come to the step of a row of metrics."""
        step, is_evaluation = row["step"], "val_loss" in row
        if is_evaluation:
            self._val = f"val {'~' if 'eval_batches' in row else ''}{row['val_loss']:.4f}"
        else:
            self._loss = f"loss {row['loss']:.4f}" if "loss" in row else ""
            self._speed = f"{row['tokens_per_s']:,.0f} tokens/s{_computing(row)}"
        if self._bar:
            self.move(step)
        elif is_evaluation or step in (1, self._steps) or self._line_is_due():
            self._line(step, self._text(step))

    def evaluating(self, step: int, share: float = 0.0) -> None:
        """An evaluation has begun, or has done a share of its targets."""
        text = f"evaluating {share:.0%}" if share else "evaluating"
        if self._bar:
            self._bar.update(self._task, completed=step, text=f"{self._val}  {text}".strip())
            return
        # Short evaluations need no line of their own. How long the first takes is not known.
        is_long = self.clock.eval_seconds is None or self.clock.eval_seconds > PLAIN_SECONDS
        if self._line_is_due() if share else is_long:
            self._line(step, text)

    def say(self, text: str) -> None:
        """A line of its own."""
        text = printable(text)
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def _text(self, step: int) -> str:
        remaining = self.clock.remaining(step)
        eta = "" if remaining is None else f"eta {remaining:.0f}s"
        return "  ".join(part for part in (self._loss, self._val, self._speed, eta) if part)

    def _line_is_due(self) -> bool:
        return time.perf_counter() - self._last_line > (CELL_SECONDS if self._cell else PLAIN_SECONDS)

    def _line(self, step: int, text: str) -> None:
        self._last_line = time.perf_counter()
        line = f"step {step}/{self._steps}  {text}".rstrip()
        if self._cell:
            self._cell.show(line)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


class NotebookLine:
    """A line of the output of a notebook's cell that takes the place of the one before."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str) -> None:
        """Shows a line."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": line}, raw=True)


def _computing(row: Row) -> str:
    """The speed of computing, as a share of the peak or in FLOP/s."""
    if "mfu" in row:
        return f"  {row['mfu']:.1%} MFU"
    return f"  {row['gflops_per_s']:,.1f} GFLOP/s" if "gflops_per_s" in row else ""
