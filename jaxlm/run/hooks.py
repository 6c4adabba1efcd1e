"""What happens beside the steps of a run. Each hook has one duty; `loop` calls them in order."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ExperimentConfig, TrainConfig
from jaxlm.optim import build_schedule
from jaxlm.run import checkpoint
from jaxlm.run.manifest import Loss
from jaxlm.run.metrics import Row
from jaxlm.run.nonfinite import DivergedError, all_finite
from jaxlm.run.progress import Progress
from jaxlm.run.saving import Saver
from jaxlm.sharding import processes
from jaxlm.training.evaluate import Report
from jaxlm.training.loop import Hook
from jaxlm.training.step import StepMetrics, TrainState
from jaxlm.types import Params

Write = Callable[[Row], None]
"""Adds a row to metrics.jsonl and shows it."""

Speed = Callable[[float], dict[str, float]]
"""What a row says of the speed of computing, from the seconds of a step: `jaxlm.analysis.expected.speed_fields`."""

Measure = Callable[[Params, Report], dict[str, Any]]
"""The losses of some parameters, as `Evaluation` measures them."""


RATES = 4096
"""Learning rates that are computed at once."""


class StopOnRequest(Hook):
    """Ends training after a signal, or when the session has lasted train.max_minutes."""

    def __init__(self, cfg: TrainConfig, received: list[int]) -> None:
        """Args: received: the numbers of the signals that have come; others add to it."""
        self._received = received
        self._end = math.inf if cfg.max_minutes is None else time.perf_counter() + 60 * cfg.max_minutes

    def should_stop(self) -> bool:
        """Whether either has happened."""
        return bool(self._received) or time.perf_counter() >= self._end


class ShowProgress(Hook):
    """Moves the progress on, and says when steps were skipped."""

    def __init__(self, progress: Progress, skipped: int) -> None:
        """Args: skipped: steps that were skipped before this session."""
        self._progress, self._skipped = progress, skipped

    def on_chunk(self, metrics: StepMetrics, steps: int, seconds: float) -> None:
        """Says what is new."""
        step, skipped = int(metrics.step), int(metrics.skipped)
        self._progress.clock.add_chunk(steps, seconds)
        self._progress.move(step)
        if new := skipped - self._skipped:
            self._progress.say(f"step {step}: {new} step{'s' * (new > 1)} skipped, gradient not finite")
            self._skipped = skipped


class CheckDivergence(Hook):
    """Ends a run whose loss or gradient is not finite."""

    def __init__(self, out: Path, saver: Saver | None = None) -> None:
        """Args: saver: what may still be saving, which must end before the last checkpoint is named."""
        self._out, self._saver = out, saver

    def on_chunk(self, metrics: StepMetrics, steps: int, seconds: float) -> None:
        """Checks the last step; the compiled loop has stopped at the first one that is wrong.

        Raises:
          DivergedError: the loss or the gradient is not finite, and the step was not skipped.
        """
        if bool(metrics.sound):
            return
        if self._saver is not None:
            self._saver.wait()
        step, loss, norm = int(metrics.step), float(metrics.loss), float(metrics.grad_norm)
        raise DivergedError(step, f"step {step}: loss {loss}, gradient norm {norm}", _advice(self._out))


def _advice(out: Path) -> str:
    """What to do about a run that has diverged."""
    saved = checkpoint.steps(out / "checkpoints")
    return (
        f"{out} keeps its last checkpoint ({f'step {saved[-1]}' if saved else 'none'}); "
        "lower --optim.learning-rate, and go on with --resume"
    )


class WriteMetrics(Hook):
    """Writes the training rows of metrics.jsonl."""

    def __init__(
        self, config: ExperimentConfig, targets_per_step: float, write: Write, speed: Speed = lambda seconds: {}
    ) -> None:
        """Args: targets_per_step: targets of a batch; of padded rows, of the average one. speed: more of a row."""
        self._cfg, self._targets_per_step, self._write, self._speed = config.train, targets_per_step, write, speed
        self._schedule = build_schedule(config.optim, config.train.steps)
        self._rates: dict[int, float] = {}
        self._steps, self._seconds = 0, 0.0  # since the last row

    def on_chunk(self, metrics: StepMetrics, steps: int, seconds: float) -> None:
        """Writes a row if the step is one to log. The row of a skipped step has no loss, rate or gradient."""
        step, skipped = int(metrics.step), int(metrics.skipped)
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        if step % self._cfg.log_every and step not in (1, self._cfg.steps):
            return
        row: Row = {"step": step}
        if not bool(metrics.is_skipped):
            # The optimizer's own count starts at 0 and leaves out skipped steps.
            rate = self._rate(step - 1 - skipped)
            row |= {"loss": float(metrics.loss), "lr": rate, "grad_norm": float(metrics.grad_norm)}
        row["tokens_per_s"] = round(self._steps * self._targets_per_step / self._seconds, 1)
        row |= self._speed(self._seconds / self._steps)
        if skipped:
            row["skipped"] = skipped
        self._steps, self._seconds = 0, 0.0
        self._write(row)

    def _rate(self, count: int) -> float:
        """The rate after `count` updates. Many are computed at once: each time waits for the chunk under way."""
        if count not in self._rates:
            counts = range(count, count + RATES)
            self._rates = dict(zip(counts, np.asarray(self._schedule(np.array(counts))).tolist(), strict=True))
        return self._rates[count]


class SaveCheckpoints(Hook):
    """Saves the state in the rhythm of train.checkpoint_every, at each new best evaluation, and where training ends.

    Must come before the hook that evaluates: whatever becomes of an evaluation, the state is safe.
    """

    def __init__(self, saver: Saver, cfg: TrainConfig, saved_step: int | None, best: Loss | None = None) -> None:
        """Args: saved_step: the step of the checkpoint that this session started from; best: the best loss so far."""
        self._saver, self._cfg, self._saved_step, self._best = saver, cfg, saved_step, best

    def on_chunk(self, metrics: StepMetrics, steps: int, seconds: float) -> None:
        """Raises the error of a save in the background."""
        self._saver.check()

    def on_boundary(self, state: TrainState, step: int) -> None:
        """Saves if the step is one to save."""
        if step % self._cfg.checkpoint_every == 0 or step == self._cfg.steps:
            self.save(state, step)

    def on_end(self, state: TrainState) -> None:
        """Saves a state that is not saved yet, because training was stopped between two checkpoints."""
        self.save(state, int(state.step))
        self._saver.wait()

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state of a step, unless it is saved already.

        Raises:
          DivergedError: its parameters are not finite, which the loss of the next step would tell.
        """
        if step != self._saved_step:
            if not all_finite(state.params):
                self._saver.wait()
                raise DivergedError(
                    step + 1, f"step {step}: parameters are not finite", _advice(self._saver.folder.parent)
                )
            self._saver.save(state, None)
            self._saved_step = step

    def add_loss(self, state: TrainState, step: int, loss: Loss) -> None:
        """The step was evaluated: its checkpoint takes the loss. A new best gets a checkpoint if it has none."""
        if self._best is None or loss.rank < self._best.rank:
            self._best = loss
            self.save(state, step)
        if step == self._saved_step:
            self._saver.add_loss(step, loss)


class Evaluate(Hook):
    """Evaluates, and writes the evaluation rows of metrics.jsonl."""

    def __init__(
        self,
        evaluation: Measure,
        cfg: TrainConfig,
        progress: Progress,
        write: Write,
        save: SaveCheckpoints,
        received: list[int],
    ) -> None:
        """Args: received: as in `StopOnRequest`; a signal ends an evaluation, which is done when the run goes on."""
        self._evaluation, self._cfg, self._progress, self._write = evaluation, cfg, progress, write
        self._save, self._received = save, received
        self.val_loss: float | None = None
        """Of the last evaluation; None if there was none in this session."""
        self.is_owed = False
        """Whether a signal came before or in an evaluation, which therefore has no row."""

    def on_boundary(self, state: TrainState, step: int) -> None:
        """Evaluates if the step is one to evaluate.

        Raises:
          CheckError: the model has diverged.
        """
        if not self._is_due(step):
            return
        if self.val_loss is None:
            self._save.save(state, step)  # the first may need more memory than there is
        started = time.perf_counter()
        try:
            self._check_signals()
            self._progress.evaluating(step)
            losses = self._evaluation(state.params, functools.partial(self._report, step))
        except _SignalError:
            self.is_owed = True
            return
        self._progress.clock.eval_seconds = time.perf_counter() - started
        self.val_loss = losses["val_loss"]
        self._write({"step": step, **losses})
        self._save.add_loss(state, step, _loss(losses))

    def catch_up(self, state: TrainState, step: int, rows: Sequence[Row]) -> None:
        """Does for the step of the checkpoint that this session starts from what the session before has not done.

        Args:
          rows: the rows of metrics.jsonl, in process 0.
        """
        if step == 0 or not self._is_due(step):
            return
        losses = [_loss(row) for row in rows if row["step"] == step and "val_loss" in row]
        val_loss, batches = losses[0] if losses else Loss(0.0)
        bits = np.array([val_loss], np.float64).view(np.int32)  # what processes can tell each other
        is_there, batches, *bits = processes.agree(bool(losses), batches or 0, *bits.tolist())[0].tolist()
        if not is_there:
            self.on_boundary(state, step)
        else:  # a kill may have come between the row and the manifest
            val_loss = float(np.array(bits, np.int32).view(np.float64)[0])
            self._save.add_loss(state, step, Loss(val_loss, batches or None))

    def _is_due(self, step: int) -> bool:
        return step % self._cfg.eval_every == 0 or step == self._cfg.steps

    def _report(self, step: int, done: int, total: int) -> None:
        if done < total:
            self._check_signals()
            self._progress.evaluating(step, done / total)

    def _check_signals(self) -> None:
        if processes.agree(bool(self._received)).any():
            raise _SignalError


def _loss(row: Row) -> Loss:
    """The loss that an evaluation row holds."""
    return Loss(row["val_loss"], row.get("eval_batches"))


class _SignalError(Exception):
    """Ends an evaluation."""
