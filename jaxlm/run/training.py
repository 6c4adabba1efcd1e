"""A training run on disk: the only place that wires data, model, optimizer, checkpoints and logging together.

config.json  tokenizer.json  metrics.jsonl  checkpoints/<step>/  loss.png  samples/
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlm.analysis.attention_maps import attention_maps
from jaxlm.config import ExperimentConfig, SampleConfig, presets
from jaxlm.config.base import difference, from_dict, to_dict
from jaxlm.data import corpus as data
from jaxlm.data import tokenizer
from jaxlm.data.corpus import Corpus
from jaxlm.data.tokenizer import Tokenizer, prompt_ids
from jaxlm.errors import CheckError, UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layers import LanguageModel
from jaxlm.optim import build_optimizer, skipped_steps
from jaxlm.run import checkpoint
from jaxlm.run import plots as report
from jaxlm.run.hooks import Evaluation, Recorder
from jaxlm.training.step import CHUNK_STEPS, init_state, loop, make_chunk
from jaxlm.types import Params

FREE_ON_RESUME = {
    "data.path",
    "data.val_path",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_minutes",
}
"""Fields a resumed run may change besides those of sample. All others decide its numbers (steps too, by the schedule,
but to train longer is what resuming is for; data that moved are known by their sha256)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model: `load_run` makes it."""

    path: Path
    config: ExperimentConfig
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    step: int
    """The checkpoint the parameters come from."""
    corpus_sha256: str | None
    """Of the data it was trained on; None where it was brought in from elsewhere."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training run ended."""

    path: Path
    step: int
    val_loss: float | None
    """Of the last evaluation; None if there was none."""
    signum: int | None
    """The signal that stopped it before its last step, if one did."""


def read_config(path: Path) -> ExperimentConfig:
    """The configuration of a run.

    Raises:
      UserError: as `_read_record`.
    """
    return _read_record(path)[0]


def _read_record(path: Path) -> tuple[ExperimentConfig, str | None]:
    """The configuration of a run and the sha256 of its text (None: it was brought in).

    Raises:
      UserError: the folder is no run, or its config.json is not one of this version.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run: it has no config.json; give the folder `jaxlm train` names")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return from_dict(ExperimentConfig, record["config"]), record["corpus_sha256"]
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
    config, sha256 = _read_record(path)
    folder = path / "checkpoints"
    steps = checkpoint.steps(folder)
    if not steps:
        raise UserError(f"{path} has no checkpoint yet: train on with --resume")
    if step is not None and step not in steps:
        raise UserError(f"step {step} has no checkpoint in {path}: choose one of {', '.join(map(str, steps))}")
    best = checkpoint.best_step(folder)
    latest = [number for number in reversed(steps) if checkpoint.readable(folder / str(number))]
    errors = [
        f"checkpoint {folder / str(number)} is damaged: its manifest cannot be read"
        for number in steps
        if number not in latest
    ]
    candidates = [step] if step is not None else latest if best is None else list(dict.fromkeys([best, *latest]))
    made = tokenizer.load(path / "tokenizer.json")
    surplus = made.vocab_size > config.model.vocab_size  # a model brought in may have more rows than there are tokens
    if surplus or (sha256 is not None and made.vocab_size != config.model.vocab_size):
        raise UserError(
            f"{path / 'tokenizer.json'} has {made.vocab_size} entries, the model {config.model.vocab_size}: "
            "put the run's own tokenizer back"
        )
    if config.model.attention_impl == "cudnn" and jax.default_backend() != "gpu":
        warnings.warn(
            f"{path} was trained with cuDNN's attention, which needs an NVIDIA GPU: using 'auto'", stacklevel=2
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_impl="auto"))
    model = build_model(config.model)
    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    for candidate in candidates:
        try:
            params = checkpoint.restore_params(folder / str(candidate), like)
        except CheckError as error:
            errors.append(str(error))
            continue
        for line in errors:
            warnings.warn(f"{line}; using step {candidate}", stacklevel=2)
        return Run(path, config, model, params, made, candidate, sha256)
    raise CheckError("; ".join(errors))


def draw_attention(run: Run, text: str, path: Path) -> list[Float[np.ndarray, "maps T T"]]:
    """Writes the picture of each layer's attention weights over a text, and returns them.

    Raises:
      UserError: a text that is empty, outside the vocabulary or too long; a model without attention; no place to write.
    """
    ids = prompt_ids(text, run.tokenizer, "text")
    maps = [layer[0] for layer in attention_maps(run.model, run.params, ids[None])]
    labels = [run.tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "␣") for token in ids.tolist()]
    if path.suffix == "" or path.is_dir():  # matplotlib would write another file
        raise UserError(f"{path} cannot be written: give --out a file with a suffix, such as .png")
    try:
        report.plot_attention_maps(maps, labels, path, f"{run.path.name}, step {run.step}")
    except (OSError, ValueError) as error:  # matplotlib refuses an unknown suffix by ValueError
        raise UserError(f"{path} cannot be written ({error}): give another --out") from None
    return maps


def evaluate(run: Run) -> dict[str, float | int]:
    """Exact losses of a run: val_loss and perplexity over the validation split, train_loss over the fixed slice."""
    check_named(run)
    corpus = data.load_corpus(run.config.data, run.tokenizer, run.config.model.max_seq_len)
    check_data(corpus.sha256, run.corpus_sha256)
    losses = Evaluation(run.model, corpus, run.config)(run.params)
    return {"step": run.step, **losses, "val_targets": data.count_targets(corpus.val, corpus.tokenizer.pad_token)}


def train(config: ExperimentConfig, out: str | Path, resume: bool = False) -> Outcome:
    """Trains a model and writes the run folder `out`; with `resume`, goes on from its latest sound checkpoint.

    Everything is checked before anything is written. SIGINT and SIGTERM end the run after the steps under way,
    with a checkpoint; a second one acts at once.

    Raises:
      UserError: bad input, an `out` that holds something (without resume) or holds no run (with it).
      CheckError: the loss or gradient is no finite number (optim.max_nonfinite skips some), or every checkpoint is
        damaged.
    """
    out = Path(out)
    stored = None
    if resume:
        made, sha256 = _read_record(out)
        if sha256 is None:
            raise UserError(f"{out} was brought in, not trained: there is no training to go on with; use another --out")
        stored = tokenizer.load(out / "tokenizer.json")
        config = _fit_vocabulary(config, stored.vocab_size)
        _check_same(config, made, out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = (
            "go on with --resume, or choose another --out" if (out / "config.json").exists() else "choose another --out"
        )
        raise UserError(f"{out} already holds {'a run' if 'resume' in hint else 'something'}: {hint}")
    corpus = data.load_corpus(config.data, stored, config.model.max_seq_len)
    if resume:
        check_data(corpus.sha256, sha256)
    config = _fit_vocabulary(config, corpus.tokenizer.vocab_size)
    config = fit_prompt(config, corpus.tokenizer)
    data.check_lengths(corpus, config.model.max_seq_len)
    model = build_model(config.model)
    params = init_params(model, jax.random.key(config.train.seed))
    tx = build_optimizer(config.optim, config.train.steps, params)
    state = init_state(params, tx)
    saved = None
    if resume:
        restored = checkpoint.restore_latest(out / "checkpoints", state)
        if restored is not None:
            state, damaged = restored
            saved = int(state.step)
            if saved > config.train.steps:
                raise UserError(f"{out} already has {saved} steps, more than steps = {config.train.steps}: give more")
            for line in damaged:
                warnings.warn(f"{line}; resuming from step {saved}", stacklevel=2)
        _write_config(out, config, corpus.sha256)
    else:
        with new_folder(out, config, corpus.tokenizer, corpus.sha256):
            pass

    with _signals() as received:
        recorder = Recorder(out, config, model, corpus, saved, received, int(skipped_steps(state.opt_state)))
        try:
            chunk = make_chunk(model, tx, config.train, corpus.tokenizer.pad_token)
            state = loop(chunk, state, _source(corpus, config), config.train, recorder)
            recorder.finish(state)
        finally:
            recorder.close()
    step = int(state.step)
    return Outcome(out, step, recorder.val_loss, received[0] if received and step < config.train.steps else None)


@contextlib.contextmanager
def new_folder(out: Path, config: ExperimentConfig, made: Tokenizer, sha256: str | None, **more: Any) -> Iterator[Path]:
    """A run folder aside, which is `out` once the block ends: it is there whole or not at all.

    Args:
      sha256: of the data; None where the run is brought in.
      more: entries of config.json besides the usual ones.

    Raises:
      UserError: it cannot be written.
    """
    out = out.resolve()
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for folder in ("checkpoints", "samples"):
            (aside / folder).mkdir(parents=True)
        (aside / "tokenizer.json").write_text(json.dumps(made.to_dict()), encoding="utf-8")
        _write_config(aside, config, sha256, **more)
        yield aside
        aside.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): choose another place") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_config(folder: Path, config: ExperimentConfig, sha256: str | None, **more: Any) -> None:
    aside = folder / "config.json.partial"
    record = {"config": to_dict(config), "corpus_sha256": sha256, **more, **provenance()}
    aside.write_text(json.dumps(record, indent=1), encoding="utf-8")
    aside.replace(folder / "config.json")


def _check_same(config: ExperimentConfig, stored: ExperimentConfig, out: Path) -> None:
    for name, ours, theirs in difference(config, stored):
        if name not in FREE_ON_RESUME and not name.startswith("sample."):
            raise UserError(
                f"{out} was made with {name} = {theirs!r}, not {ours!r}: drop that change, or start a new --out"
            )


def check_named(run: Run) -> None:
    """Refuses a run that was brought in and is given no data.

    Raises:
      UserError: it was, and `data.path` names none.
    """
    if run.corpus_sha256 is None and run.config.data.path is None:
        raise UserError(f"{run.path} was brought in and has no data of its own: name a text by --data.path")


def check_data(found: str, wanted: str | None) -> None:
    """Refuses data whose sha256 is not that of the run; None takes any.

    Raises:
      UserError: they differ.
    """
    if wanted is not None and found != wanted:
        raise UserError(
            f"the text has changed: its sha256 is {found[:12]}..., the run's {wanted[:12]}...; "
            "put the run's own text back, or name it by --data.path"
        )


def fit_prompt(config: ExperimentConfig, made: Tokenizer) -> ExperimentConfig:
    """The config with a prompt the tokenizer knows: where there is no newline the default one cannot be used."""
    try:
        prompt_ids(config.sample.prompt, made)
    except UserError:
        if config.sample.prompt != SampleConfig().prompt:
            raise
        texts = (made.decode([i]) for i in range(made.vocab_size if made.eos_token is None else 0))
        prompt = next((text for text in texts if text and len(made.encode(text))), "")
        return dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompt=prompt))
    return config


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
    checkout, commit = Path(__file__).parents[2], None
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
        # Always equally many, so that the program is one; `loop` never takes more at once.
        count = min(cfg.log_every, CHUNK_STEPS)
        return jnp.asarray(data.host_windows(corpus.train, cfg.seed, first, count, cfg.batch_size, seq_len))

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
