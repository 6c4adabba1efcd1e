"""A training run on disk: the only place that wires data, model, optimizer, checkpoints and logging together.

config.json  tokenizer.json  metrics.jsonl  checkpoints/<step>/  loss.png  samples/
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import checkpoint, data, metrics, presets, report, tokenizer
from jaxlm.config import ExperimentConfig, SampleConfig, difference, from_dict, to_dict
from jaxlm.data import Corpus
from jaxlm.decode import generate
from jaxlm.errors import CheckError, UserError
from jaxlm.model import Transformer, build_model, init_params
from jaxlm.optim import build_optimizer, build_schedule
from jaxlm.tokenizer import Tokenizer
from jaxlm.train import StepMetrics, TrainState, init_state, loop, make_chunk, make_evaluate
from jaxlm.types import Params

FREE_ON_RESUME = {
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_minutes",
}
"""Fields a resumed run may change besides those of sample. All others decide its numbers (steps too, by the schedule,
but to train longer is what resuming is for)."""

DIVERGED = 700.0
"""A loss above this many nats has no perplexity in float64."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model: `load_run` makes it."""

    path: Path
    config: ExperimentConfig
    model: Transformer
    params: Params
    tokenizer: Tokenizer
    step: int
    """The checkpoint the parameters come from."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training run ended."""

    path: Path
    step: int
    val_loss: float | None
    """Of the last evaluation; None if there was none."""
    signum: int | None
    """The signal that stopped it, if one did."""


def read_config(path: Path) -> ExperimentConfig:
    """The configuration of a run.

    Raises:
      UserError: the folder is no run, or its config.json is not one of this version.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run: it has no config.json; give the folder `jaxlm train` names")
    try:
        return from_dict(ExperimentConfig, json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no configuration of this version: {error}") from None


def load_run(path: str | Path, step: int | None = None) -> Run:
    """Opens a run with the parameters of one checkpoint.

    Args:
      step: which checkpoint; None = the one with the lowest validation loss (the latest if none was evaluated),
        and when that is damaged, which a warning says, the latest sound one.

    Raises:
      UserError: no run there, or no such checkpoint.
      CheckError: the checkpoint, or every one of them, is damaged.
    """
    path = Path(path)
    config = read_config(path)
    folder = path / "checkpoints"
    steps = checkpoint.steps(folder)
    if not steps:
        raise UserError(f"{path} has no checkpoint yet: train on with --resume")
    if step is not None and step not in steps:
        raise UserError(f"step {step} has no checkpoint in {path}: choose one of {', '.join(map(str, steps))}")
    best = checkpoint.best_step(folder)
    candidates = [step] if step is not None else dict.fromkeys([best or steps[-1], *reversed(steps)])
    model = build_model(config.model)
    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    errors = []
    for candidate in candidates:
        try:
            params = checkpoint.restore_params(folder / str(candidate), like)
        except CheckError as error:
            errors.append(str(error))
            continue
        for line in errors:
            warnings.warn(f"{line}; using step {candidate}", stacklevel=2)
        return Run(path, config, model, params, tokenizer.load(path / "tokenizer.json"), candidate)
    raise CheckError("; ".join(errors))


def sample(run: Run, cfg: SampleConfig) -> list[str]:
    """Texts drawn from a run, prompt included; cfg decides every character.

    Raises:
      UserError: a prompt that is empty or has characters outside the vocabulary.
    """
    if not cfg.prompt:
        raise UserError("prompt is empty: give at least one character")
    prompt = run.tokenizer.encode(cfg.prompt)
    out = generate(
        run.model,
        run.params,
        prompt[None],
        max_new_tokens=cfg.max_new_tokens,
        key=jax.random.key(cfg.seed),
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        num_samples=cfg.num_samples,
    )
    return [cfg.prompt + run.tokenizer.decode(row.tolist()) for row in np.asarray(out.tokens)]


def evaluate(run: Run) -> dict[str, float | int]:
    """Exact losses of a run: val_loss and perplexity over the validation split, train_loss over the fixed slice."""
    corpus = data.load_corpus(run.config.data, run.tokenizer)
    losses = _Evaluation(run.model, corpus, run.config)(run.params)
    return {"step": run.step, **losses, "val_targets": len(corpus.val) - 1}


def train(config: ExperimentConfig, out: str | Path, resume: bool = False) -> Outcome:
    """Trains a model and writes the run folder `out`; with `resume`, goes on from its latest sound checkpoint.

    Everything is checked before anything is written. SIGINT and SIGTERM end the run after the steps under way,
    with a checkpoint; a second one acts at once.

    Raises:
      UserError: bad input, an `out` that holds something (without resume) or holds no run (with it).
      CheckError: the loss or gradient is no finite number, or every checkpoint is damaged.
    """
    out = Path(out)
    stored = None
    if resume:
        made = read_config(out)
        stored = tokenizer.load(out / "tokenizer.json")
        config = _fit_vocabulary(config, stored.vocab_size)
        _check_same(config, made, out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = (
            "go on with --resume, or choose another --out" if (out / "config.json").exists() else "choose another --out"
        )
        raise UserError(f"{out} already holds {'a run' if 'resume' in hint else 'something'}: {hint}")
    corpus = data.load_corpus(config.data, stored)
    config = _fit_vocabulary(config, corpus.tokenizer.vocab_size)
    data.check_lengths(corpus, config.model.max_seq_len)
    model = build_model(config.model)
    tx = build_optimizer(config.optim, config.train.steps)
    state = init_state(init_params(model, jax.random.key(config.train.seed)), tx)
    saved = None
    if resume:
        restored = checkpoint.restore_latest(out / "checkpoints", state)
        if restored is not None:
            state, damaged = restored
            saved = int(state.step)
            for line in damaged:
                warnings.warn(f"{line}; resuming from step {saved}", stacklevel=2)
        _write_config(out, config)
    else:
        _make_folder(out, config, corpus.tokenizer)

    with _signals() as received:
        recorder = _Recorder(out, config, model, corpus, saved, received)
        try:
            chunk = make_chunk(model, tx, config.train)
            state = loop(chunk, state, _source(corpus, config), config.train, recorder)
            recorder.finish(state)
        finally:
            recorder.close()
    return Outcome(out, int(state.step), recorder.val_loss, received[0] if received else None)


def _make_folder(out: Path, config: ExperimentConfig, made: Tokenizer) -> None:
    """Makes a run folder aside and renames it: it is there whole or not at all."""
    aside = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    try:
        for folder in ("checkpoints", "samples"):
            (aside / folder).mkdir(parents=True)
        (aside / "tokenizer.json").write_text(json.dumps(made.to_dict()), encoding="utf-8")
        _write_config(aside, config)
        aside.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): choose another --out") from None


def _write_config(folder: Path, config: ExperimentConfig) -> None:
    aside = folder / "config.json.partial"
    aside.write_text(json.dumps({"config": to_dict(config), **provenance()}, indent=1), encoding="utf-8")
    aside.replace(folder / "config.json")


def _check_same(config: ExperimentConfig, stored: ExperimentConfig, out: Path) -> None:
    for name, ours, theirs in difference(config, stored):
        if name not in FREE_ON_RESUME and not name.startswith("sample."):
            raise UserError(
                f"{out} was made with {name} = {theirs!r}, not {ours!r}: drop that change, or start a new --out"
            )


def _fit_vocabulary(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The config with the tokenizer's vocabulary size; a size the user chose himself must be that one."""
    chosen = config.model.vocab_size
    usual = presets.preset(config.preset).model.vocab_size if config.preset in presets.PRESETS else None
    if chosen not in (vocab_size, usual):
        raise UserError(f"vocab_size = {chosen} is not the tokenizer's {vocab_size}: leave it out")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def provenance() -> dict[str, Any]:
    """Versions, git commit and device: what besides a config the numbers may depend on."""
    packages = "jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"
    checkout, commit = Path(__file__).parent.parent, None
    if (checkout / ".git").exists() and (git := shutil.which("git")):
        command = [git, "-C", str(checkout), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": commit,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }


def _source(corpus: Corpus, config: ExperimentConfig):
    """What the compiled loop reads: the split itself when it fits the device, else each chunk's windows."""
    cfg, seq_len = config.train, config.model.max_seq_len
    if not isinstance(corpus.train, np.memmap):
        resident = jnp.asarray(corpus.train)
        return lambda first, stop: resident

    def windows(first: int, stop: int) -> jax.Array:
        # Always log_every steps long, so that the program is one; `loop` never takes more at once.
        return jnp.asarray(data.host_windows(corpus.train, cfg.seed, first, cfg.log_every, cfg.batch_size, seq_len))

    return windows


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one meets the old handler."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    old = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def note(signum, frame):
        received.append(signum)
        signal.signal(signum, old[signum])

    for signum in old:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


class _Evaluation:
    """Exact losses over the validation split and over a training slice as long."""

    def __init__(self, model: Transformer, corpus: Corpus, config: ExperimentConfig) -> None:
        self._loss = make_evaluate(model)
        self._splits = {"val_loss": corpus.val, "train_loss": corpus.train[: len(corpus.val)]}
        self._shape = config.model.max_seq_len, 4 * config.train.batch_size // config.train.grad_accum

    def __call__(self, params: Params) -> dict[str, float]:
        losses = {
            name: self._loss(params, data.eval_batches(tokens, *self._shape)) for name, tokens in self._splits.items()
        }
        if not max(losses.values()) < DIVERGED:
            raise CheckError(f"the model has diverged: {losses}; lower --optim.learning-rate")
        return {**losses, "perplexity": math.exp(losses["val_loss"])}


class _Recorder:
    """The hooks of the loop: rows, progress, evaluations, checkpoints."""

    def __init__(
        self,
        out: Path,
        config: ExperimentConfig,
        model: Transformer,
        corpus: Corpus,
        saved: int | None,
        received: list[int],
    ) -> None:
        self.out, self.config, self.received = out, config, received
        self.val_loss: float | None = None
        self._evaluation = _Evaluation(model, corpus, config)
        self._schedule = build_schedule(config.optim, config.train.steps)
        self._rows = metrics.MetricsFile(out / "metrics.jsonl", saved or 0)
        self._progress = metrics.Progress(config.train.steps, saved or 0)
        self._started = time.perf_counter() - self._rows.elapsed_s
        self._session_started = time.perf_counter()
        self._saved = saved
        self._steps, self._seconds = 0, 0.0

    def stop(self) -> bool:
        minutes = self.config.train.max_minutes
        return bool(self.received) or (
            minutes is not None and time.perf_counter() - self._session_started >= 60 * minutes
        )

    def report(self, step_metrics: StepMetrics, steps: int, seconds: float) -> None:
        cfg, step = self.config.train, int(step_metrics.step)
        loss, grad_norm = float(step_metrics.loss), float(step_metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise CheckError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; {self.out} keeps its last checkpoint "
                f"({'none' if self._saved is None else f'step {self._saved}'}); lower --optim.learning-rate"
            )
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        if step % cfg.log_every and step not in (1, cfg.steps):
            self._progress.update(step, None)
            return
        speed = self._steps * cfg.batch_size * self.config.model.max_seq_len / self._seconds
        rate = float(self._schedule(step - 1))
        self._write({"step": step, "loss": loss, "lr": rate, "grad_norm": grad_norm, "tokens_per_s": round(speed, 1)})
        self._steps, self._seconds = 0, 0.0

    def boundary(self, state: TrainState, step: int) -> None:
        cfg, last, val_loss = self.config.train, step == self.config.train.steps, None
        if step % cfg.eval_every == 0 or last:
            losses = self._evaluation(state.params)
            val_loss = self.val_loss = losses["val_loss"]
            self._write({"step": step, **losses})
        if step % cfg.checkpoint_every == 0 or last:
            checkpoint.save(self.out / "checkpoints", state, val_loss, cfg.keep)
            self._saved = step

    def finish(self, state: TrainState) -> None:
        """Saves where a signal or the time limit ended the run between checkpoints, and draws the curve."""
        step = int(state.step)
        if step != self._saved:
            checkpoint.save(self.out / "checkpoints", state, None, self.config.train.keep)
        rows = metrics.read_rows(self.out / "metrics.jsonl")
        if rows:
            report.plot_loss(rows, self.out / "loss.png", self.out.name)
        if step < self.config.train.steps:
            why = signal.Signals(self.received[0]).name if self.received else "max_minutes"
            self._progress.say(f"stopped by {why} at step {step}; saved; go on with --resume --out {self.out}")

    def close(self) -> None:
        self._progress.close()
        self._rows.close()

    def _write(self, row: metrics.Row) -> None:
        row["elapsed_s"] = round(time.perf_counter() - self._started, 3)
        self._rows.write(row)
        self._progress.update(row["step"], row)
