"""A training run on disk: the only place that wires data, model, optimizer, checkpoints and logging together.

config.json  tokenizer.json  metrics.jsonl  checkpoints/<step>/  loss.png  samples/
"""

import contextlib
import dataclasses
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ExperimentConfig, SampleConfig, presets
from jaxlm.config.base import difference
from jaxlm.data import tokenizer
from jaxlm.data.batches import host_windows
from jaxlm.data.corpus import Corpus, check_lengths, load_corpus
from jaxlm.data.tokenizer import Tokenizer, prompt_ids
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer, skipped_steps
from jaxlm.run import checkpoint
from jaxlm.run.folder import _read_record, _write_config, check_data, new_folder
from jaxlm.run.hooks import Recorder
from jaxlm.training.loop import CHUNK_STEPS, loop, make_chunk
from jaxlm.training.step import init_state

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
class Outcome:
    """How a training run ended."""

    path: Path
    step: int
    val_loss: float | None
    """Of the last evaluation; None if there was none."""
    signum: int | None
    """The signal that stopped it before its last step, if one did."""


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
    corpus = load_corpus(config.data, stored, config.model.max_seq_len)
    if resume:
        check_data(corpus.sha256, sha256)
    config = _fit_vocabulary(config, corpus.tokenizer.vocab_size)
    config = fit_prompt(config, corpus.tokenizer)
    check_lengths(corpus, config.model.max_seq_len)
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


def _check_same(config: ExperimentConfig, stored: ExperimentConfig, out: Path) -> None:
    for name, ours, theirs in difference(config, stored):
        if name not in FREE_ON_RESUME and not name.startswith("sample."):
            raise UserError(
                f"{out} was made with {name} = {theirs!r}, not {ours!r}: drop that change, or start a new --out"
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


def _source(corpus: Corpus, config: ExperimentConfig):
    """What the compiled loop reads: the split itself when it fits the device, else each chunk's windows."""
    cfg, seq_len = config.train, config.model.max_seq_len
    if not isinstance(corpus.train, np.memmap):
        resident = jnp.asarray(corpus.train)
        return lambda first, stop: resident

    def windows(first: int, stop: int) -> jax.Array:
        # Always equally many, so that the program is one; `loop` never takes more at once.
        count = min(cfg.log_every, CHUNK_STEPS)
        return jnp.asarray(host_windows(corpus.train, cfg.seed, first, count, cfg.batch_size, seq_len))

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
