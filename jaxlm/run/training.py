"""Training a run on disk: the only place that connects data, model, optimizer, checkpoints and logging."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax

from jaxlm.config import ExperimentConfig, SampleConfig, presets
from jaxlm.config.base import difference, to_dict
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.corpus import Corpus, document_end, load_corpus, with_own_tokenizer
from jaxlm.data.tokenizer import Tokenizer, prompt_ids
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.canary import warn_of_known_fault
from jaxlm.ops.matmul import matmul_precision
from jaxlm.optim import build_optimizer, skipped_steps
from jaxlm.run import checkpoint, hooks
from jaxlm.run.folder import Run, check_data, check_vocabulary, new_folder, read_record, write_config
from jaxlm.run.init_from import (
    check_tokenizer,
    fitting_params,
    open_source,
    source_corpus,
    source_entry,
    with_source_settings,
)
from jaxlm.run.metrics import MetricsFile, NoMetricsFile, Row, read_rows
from jaxlm.run.plots import plot_loss
from jaxlm.run.progress import Progress
from jaxlm.sharding import processes
from jaxlm.sharding.layout import check_batch, put, put_params
from jaxlm.sharding.mesh import make_mesh, use_mesh
from jaxlm.training.evaluate import Evaluation
from jaxlm.training.loop import CHUNK_STEPS, loop, make_chunk
from jaxlm.training.step import TrainState, init_state
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
"""Fields that a resumed run may change, besides those of `sample` and `mesh`. All others decide the numbers of the run.

train.steps does too, through the schedule, but training longer is what resuming is for. Data that have moved are
recognised by their sha256.
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training run ended."""

    path: Path
    """The run's folder, for `jaxlm.load_run`."""
    step: int
    """Steps the run has taken, those before a resumption included; its latest checkpoint is of this step."""
    val_loss: float | None
    """Nats per token, of the last evaluation in this session; None if there was none."""
    signum: int | None
    """The signal that stopped the run before its last step; None if no signal did."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A run that is ready to train: everything has been checked, and its folder is there."""

    out: Path
    config: ExperimentConfig
    corpus: Corpus
    model: LanguageModel
    tx: optax.GradientTransformation
    state: TrainState
    saved_step: int | None = None
    """The step of the checkpoint that holds the state; None = there is none."""


def train(
    config: ExperimentConfig,
    out: str | Path,
    resume: bool = False,
    keep_warmup: bool = False,
    *,
    init_from: str | Path | Run | None = None,
    extend_positions: bool = False,
) -> Outcome:
    """Trains a model and writes the run folder `out`; with `resume`, continues from its latest sound checkpoint.

    Everything is checked before anything is written. SIGINT and SIGTERM end the run after the steps under way, with a
    checkpoint; a second signal acts at once. Progress goes to stderr, and rows to out/metrics.jsonl, whose fields
    `jaxlm.run.metrics` lists.

    With config.mesh.coordinator, all processes of the training call this alike, before they compute anything. Process 0
    writes and shows; a signal to one stops all; one that dies or fails ends all.

    Args:
      keep_warmup: use optim.warmup_steps as it is. Otherwise the warm-up of a preset shrinks with train.steps.
      init_from: a run whose weights (of the checkpoint that `jaxlm.load_run` opens) and tokenizer the new run begins
        with, or a Hugging Face folder; optimizer and step are new, and its stop tokens stay. Its parameters must have
        the names, shapes and types of `config.model`, and `config.data` is read with its tokenizer. Checkpoint 0 holds
        what the run began with, and config.json names the source.
      extend_positions: with init_from, a `config.model.max_seq_len` beyond its learned position table adds rows of
        zeros. Otherwise that is refused. A shorter max_seq_len keeps the first rows.

    Returns:
      An Outcome: `path` is the run's folder, for `jaxlm.load_run`; `step` is how many steps it has taken; `val_loss`
      is the last validation loss in nats per token, or None if this session evaluated nothing; `signum` is the signal
      that stopped it early, or None.

    Raises:
      UserError: bad input, an `out` that is not empty (without resume), or an `out` that is not a run (with it); an
        `init_from` that is not a run, or whose weights or vocabulary do not fit.
      CheckError: the loss or gradient is not finite (optim.max_nonfinite skips some such steps), or every checkpoint is
        damaged.
    """
    if not isinstance(config, ExperimentConfig):
        raise UserError(f"config = {config!r} is not an ExperimentConfig: give one, such as jaxlm.preset('tiny')")
    out = Path(out)
    if resume and (init_from is not None or extend_positions):
        path = init_from.path if isinstance(init_from, Run) else init_from
        option = "--model.extend-positions" if init_from is None else f"--init-from {path}"
        raise UserError(f"{option} is for a new run, and --resume goes on with an old one: leave one out")
    if init_from is None and extend_positions:
        raise UserError("--model.extend-positions is for the weights of another run: add --init-from, or leave it out")
    with processes.joined(config.mesh):
        warn_of_known_fault()
        source = str(init_from.path if isinstance(init_from, Run) else init_from)
        options = {"resume": resume, "keep_warmup": keep_warmup, "extend_positions": extend_positions}
        processes.check_same({**_shared(config), "out": str(out), "init_from": source, **options})
        mesh = make_mesh(config.mesh)
        with use_mesh(mesh):
            if mesh is not None:
                check_batch(config.train, dict(mesh.shape))
            if resume:
                session = resumed_session(config, out)
            else:
                session = new_session(config, out, keep_warmup, init_from, extend_positions)
            with _signals() as received, matmul_precision(session.config.train.matmul_precision):
                return _run(session, received)


def new_session(
    config: ExperimentConfig,
    out: Path,
    keep_warmup: bool = False,
    init_from: str | Path | Run | None = None,
    extend_positions: bool = False,
) -> Session:
    """Checks a config and its data, and creates the run folder.

    Raises:
      UserError: as `train`.
      CheckError: every checkpoint of `init_from` is damaged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        is_run = (out / "config.json").exists()
        fix = "continue it with --resume, or choose another --out" if is_run else "choose another --out"
        raise UserError(f"{out} already holds {'a run' if is_run else 'something'}: {fix}")
    config = dataclasses.replace(config, data=with_own_tokenizer(config.data))
    if not keep_warmup:
        config = shrink_warmup(config)
    processes.wait("out is checked")
    if init_from is not None:
        return _session_from(open_source(init_from), config, out, extend_positions)
    with processes.first_before_others("the corpus is read"):
        corpus = load_corpus(config.data, config.model.max_seq_len)
    session = _session(_fit_vocabulary(config, corpus.tokenizer.vocab_size), out, corpus)
    if processes.first():
        with new_folder(out, session.config, corpus.tokenizer, corpus.sha256):
            pass
    processes.wait("the folder is there")
    return session


def _session_from(source: Run, config: ExperimentConfig, out: Path, extend_positions: bool) -> Session:
    """As `new_session`, with the weights and the vocabulary of a run. They are saved as checkpoint 0."""
    config = with_source_settings(config, source)
    check_tokenizer(config, source)
    config = _fit_vocabulary(config, source.config.model.vocab_size)
    params = fitting_params(source, config.model, extend_positions)
    corpus = source_corpus(config, source)
    session = _session(config, out, corpus, params)
    with new_folder(out, session.config, corpus.tokenizer, corpus.sha256, init_from=source_entry(source)) as folder:
        checkpoint.save(folder / "checkpoints", session.state, None, config.train.keep)
    return dataclasses.replace(session, saved_step=0)


def resumed_session(config: ExperimentConfig, out: Path) -> Session:
    """Checks that a config continues the run in `out`, and restores its latest sound checkpoint.

    Raises:
      UserError: as `train`.
      CheckError: every checkpoint is damaged.
    """
    config = dataclasses.replace(config, data=with_own_tokenizer(config.data))
    record = read_record(out)
    stored_config, sha256 = record.config, record.corpus_sha256
    if sha256 is None:
        raise UserError(f"{out} was imported, not trained: there is no training to continue; use another --out")
    tokenizer = tokenizers.load(out / "tokenizer.json")
    if config.optim.warmup_steps == _preset_warmup(config):  # a new run may have shrunk it; `stored_config` knows
        optim = dataclasses.replace(config.optim, warmup_steps=stored_config.optim.warmup_steps)
        config = dataclasses.replace(config, optim=optim)
    check_vocabulary(out, tokenizer, record)
    config = _fit_vocabulary(config, stored_config.model.vocab_size)
    _check_same(config, stored_config, out)
    with processes.first_before_others("the corpus is read"):
        corpus = load_corpus(config.data, config.model.max_seq_len, tokenizer)
    check_data(corpus.sha256, sha256)
    session = _session(config, out, corpus)
    # Without a checkpoint the run was stopped before its first one, and begins again.
    restored = checkpoint.restore_latest(out / "checkpoints", session.state)
    if restored is None and record.init_from is not None:
        raise UserError(
            f"{out} has lost its checkpoints, the weights it began with too: start a new --out with "
            f"--init-from {record.init_from['run']}"
        )
    if restored is not None:
        state, damaged = restored
        saved_step, steps = int(state.step), config.train.steps
        if saved_step > steps:
            raise UserError(f"{out} already has {saved_step} steps, more than steps = {steps}: give more")
        for line in damaged:
            warnings.warn(f"{line}; resuming from step {saved_step}", stacklevel=3)
        session = dataclasses.replace(session, state=state, saved_step=saved_step)
    more = {} if record.init_from is None else {"init_from": record.init_from}
    processes.wait("the run is read")
    if processes.first():
        write_config(out, session.config, corpus.sha256, **more)
    return session


def _session(config: ExperimentConfig, out: Path, corpus: Corpus, params: Params | None = None) -> Session:
    """A session at step 0, with these parameters or else new ones. Nothing is written yet."""
    vocabulary = hashlib.sha256(json.dumps(corpus.tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()
    processes.check_same({"sha256 of the data": corpus.sha256, "sha256 of the tokenizer": vocabulary})
    config = fit_prompt(config, corpus.tokenizer)
    corpus.check_lengths()
    model = build_model(config.model)
    params = init_params(model, jax.random.key(config.train.seed)) if params is None else put_params(model, params)
    tx = build_optimizer(config.optim, config.train.steps, params)
    return Session(out, config, corpus, model, tx, init_state(params, tx))


def _run(session: Session, received: list[int]) -> Outcome:
    """Trains to the last step, or until a signal or the time limit."""
    out, cfg, train_split = session.out, session.config.train, session.corpus.train
    done, first = session.saved_step or 0, processes.first()
    processes.advise(lambda: _how_to_go_on(out))
    with (
        contextlib.closing(MetricsFile(out / "metrics.jsonl", done) if first else NoMetricsFile()) as rows,
        contextlib.closing(Progress(cfg, done, shown=first)) as progress,
    ):

        def write(row: Row) -> None:
            rows.write(row)
            progress.show(row)

        evaluation = Evaluation(session.model, session.corpus, session.config)
        evaluate = hooks.Evaluate(evaluation, cfg, progress, write)
        # The order matters: a diverged step gets no row, and a checkpoint takes the loss of its step.
        in_order = (
            hooks.StopOnRequest(cfg, received),
            hooks.ShowProgress(progress, skipped=int(skipped_steps(session.state.opt_state))),
            hooks.CheckDivergence(out),
            hooks.WriteMetrics(session.config, cfg.batch_size * train_split.targets_per_window, write),
            evaluate,
            hooks.SaveCheckpoints(out / "checkpoints", cfg, evaluate, session.saved_step),
        )
        # A chunk ends where a row is due, so the windows of `log_every` steps are all that it can read.
        source = train_split.feed(cfg.seed, cfg.batch_size, min(cfg.log_every, CHUNK_STEPS), put)
        chunk = make_chunk(
            session.model, session.tx, cfg, session.state, document_end(session.config.data, train_split)
        )
        state = loop(chunk, session.state, source, cfg, in_order)
        if first and (logged := read_rows(out / "metrics.jsonl")):
            plot_loss(logged, out / "loss.png", out.name)
        step = int(state.step)
        stopped_early = step < cfg.steps
        signum = int(processes.agree(received[0] if received else 0).max())
        if stopped_early:
            why = signal.Signals(signum).name if signum else "max_minutes"
            progress.say(f"stopped by {why} at step {step}; saved; continue with --resume --out {out}")
    return Outcome(out, step, evaluate.val_loss, signum if signum and stopped_early else None)


def _how_to_go_on(out: Path) -> str:
    """What the user does when one of several processes has died."""
    saved = checkpoint.steps(out / "checkpoints")
    kept = f"keeps its checkpoint of step {saved[-1]}" if saved else "has no checkpoint yet"
    return f"{out} {kept}: start all again with --resume --out {out}"


def _shared(config: ExperimentConfig) -> dict[str, Any]:
    """What must be the same in all processes: not who they are, nor where their data lie, whose sha256 counts."""
    data = dataclasses.replace(config.data, path=None, val_path=None)
    return to_dict(dataclasses.replace(config, data=data, mesh=config.mesh.without_processes()))


def _check_same(config: ExperimentConfig, stored: ExperimentConfig, out: Path) -> None:
    for name, ours, theirs in difference(config, stored):
        if name not in FREE_ON_RESUME and not name.startswith(("sample.", "mesh.")):
            raise UserError(
                f"{out} was trained with {name} = {theirs!r}, not {ours!r}: drop that change, or start a new --out"
            )


def fit_prompt(config: ExperimentConfig, tokenizer: Tokenizer) -> ExperimentConfig:
    """The config with a prompt that the tokenizer knows.

    The default prompt, a newline, is replaced if the vocabulary has none; a prompt of the user's own is refused.

    Raises:
      UserError: the prompt is the user's own and has characters outside the vocabulary.
    """
    try:
        prompt_ids(config.sample.prompt, tokenizer, special_tokens=config.sample.special_tokens)
    except UserError:
        if config.sample.prompt != SampleConfig().prompt:
            raise
        # The first token that is text on its own. Where rows begin with <eos>, the prompt may be empty.
        ids = range(tokenizer.vocab_size if tokenizer.eos_token is None else 0)
        texts = (tokenizer.decode([i]) for i in ids)
        prompt = next((text for text in texts if text and len(tokenizer.encode(text))), "")
        return dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompt=prompt))
    return config


def _fit_vocabulary(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The config with the vocabulary's true size; a size that differs from the preset's must be that one."""
    chosen = config.model.vocab_size
    usual = presets.preset(config.preset).model.vocab_size if config.preset in presets.PRESETS else None
    if chosen not in (vocab_size, usual):
        first = min(chosen, vocab_size)
        raise UserError(
            f"vocab_size = {chosen} is not the tokenizer's {vocab_size} (ids from {first} on differ): leave it out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def _preset_warmup(config: ExperimentConfig) -> int | None:
    """The warm-up of the config's preset; None if it has no preset."""
    return presets.preset(config.preset).optim.warmup_steps if config.preset in presets.PRESETS else None


def shrink_warmup(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the same share of warm-up as its preset, if it has fewer steps; a warning says so.

    A warm-up other than the preset's was chosen by the user and stays. `build_schedule` refuses it if it does not fit.
    """
    steps, warmup = config.train.steps, config.optim.warmup_steps
    if warmup == 0 or warmup != _preset_warmup(config):
        return config
    usual_steps = presets.preset(config.preset).train.steps
    if steps >= usual_steps:
        return config
    shorter = warmup * steps // usual_steps
    warnings.warn(
        f"the preset's warm-up of {warmup} steps shrinks to {shorter}, because steps = {steps} instead of "
        f"{usual_steps}; set another with --optim.warmup-steps",
        stacklevel=4,
    )
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=shorter))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of ending at once; a second signal meets the old handler."""
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
