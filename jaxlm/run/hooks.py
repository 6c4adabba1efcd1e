"""What happens beside the steps of a run: rows, progress, evaluations, checkpoints, the curve."""

import math
import signal
import time
from pathlib import Path

from jaxlm.config import ExperimentConfig
from jaxlm.data.batches import count_targets
from jaxlm.data.corpus import Corpus
from jaxlm.errors import CheckError
from jaxlm.model.layers import LanguageModel
from jaxlm.optim import build_schedule
from jaxlm.run import checkpoint, metrics
from jaxlm.run.plots import plot_loss
from jaxlm.training.evaluate import Evaluation
from jaxlm.training.step import StepMetrics, TrainState


class Recorder:
    """The hooks of the loop: rows, progress, evaluations, checkpoints."""

    def __init__(
        self,
        out: Path,
        config: ExperimentConfig,
        model: LanguageModel,
        corpus: Corpus,
        saved: int | None,
        received: list[int],
        skipped: int = 0,
    ) -> None:
        self.out, self.config, self.received = out, config, received
        self.val_loss: float | None = None
        self._evaluation = Evaluation(model, corpus, config)
        self._schedule = build_schedule(config.optim, config.train.steps)
        self._rows = metrics.MetricsFile(out / "metrics.jsonl", saved or 0)
        self._progress = metrics.Progress(config.train.steps, saved or 0)
        self._started = time.perf_counter() - self._rows.elapsed_s
        self._session_started = time.perf_counter()
        self._saved, self._evaluated = saved, -1
        self._steps, self._seconds, self._skipped = 0, 0.0, skipped
        self._targets = float(config.train.batch_size * config.model.max_seq_len)
        if corpus.train.ndim == 2:
            targets = count_targets(corpus.train, corpus.tokenizer.pad_token)
            self._targets = config.train.batch_size * targets / len(corpus.train)

    def stop(self) -> bool:
        """Whether a signal or the time limit ends the run."""
        minutes = self.config.train.max_minutes
        return bool(self.received) or (
            minutes is not None and time.perf_counter() - self._session_started >= 60 * minutes
        )

    def report(self, step_metrics: StepMetrics, steps: int, seconds: float) -> None:
        """Logs the steps that are to be logged; tokens_per_s counts targets, of rows those of the average one.

        Says so where steps were skipped; the row of a skipped one has no loss, rate or gradient.

        Raises:
          CheckError: the loss or the gradient is no finite number, and the step was not skipped.
        """
        cfg, step = self.config.train, int(step_metrics.step)
        loss, grad_norm = float(step_metrics.loss), float(step_metrics.grad_norm)
        skipped, is_skipped = int(step_metrics.skipped), bool(step_metrics.is_skipped)
        if new := skipped - self._skipped:
            self._progress.say(f"step {step}: {new} step{'s' * (new > 1)} skipped, gradient not finite")
            self._skipped = skipped
        if not (is_skipped or (math.isfinite(loss) and math.isfinite(grad_norm))):
            raise CheckError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; {self.out} keeps its last checkpoint "
                f"({'none' if self._saved is None else f'step {self._saved}'}); lower --optim.learning-rate"
            )
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        if step % cfg.log_every and step not in (1, cfg.steps):
            self._progress.update(step, None)
            return
        row: metrics.Row = {"step": step}
        if not is_skipped:
            row |= {"loss": loss, "lr": float(self._schedule(step - 1 - skipped)), "grad_norm": grad_norm}
        row["tokens_per_s"] = round(self._steps * self._targets / self._seconds, 1)
        self._write(row | ({"skipped": skipped} if skipped else {}))
        self._steps, self._seconds = 0, 0.0

    def boundary(self, state: TrainState, step: int) -> None:
        """Evaluates and saves where it is time to."""
        cfg, last, val_loss = self.config.train, step == self.config.train.steps, None
        if step % cfg.eval_every == 0 or last:
            losses = self._evaluation(state.params)
            val_loss = self.val_loss = losses["val_loss"]
            self._evaluated = step
            self._write({"step": step, **losses})
        if step % cfg.checkpoint_every == 0 or last:
            checkpoint.save(self.out / "checkpoints", state, val_loss, cfg.keep)
            self._saved = step

    def finish(self, state: TrainState) -> None:
        """Saves where a signal or the time limit ended the run between checkpoints, and draws the curve."""
        step = int(state.step)
        if step != self._saved:
            val_loss = self.val_loss if step == self._evaluated else None
            checkpoint.save(self.out / "checkpoints", state, val_loss, self.config.train.keep)
        rows = metrics.read_rows(self.out / "metrics.jsonl")
        if rows:
            plot_loss(rows, self.out / "loss.png", self.out.name)
        if step < self.config.train.steps:
            why = signal.Signals(self.received[0]).name if self.received else "max_minutes"
            self._progress.say(f"stopped by {why} at step {step}; saved; go on with --resume --out {self.out}")

    def close(self) -> None:
        """Leaves the terminal and the files in order."""
        self._progress.close()
        self._rows.close()

    def _write(self, row: metrics.Row) -> None:
        row["elapsed_s"] = round(time.perf_counter() - self._started, 3)
        self._rows.write(row)
        self._progress.update(row["step"], row)
