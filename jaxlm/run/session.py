"""A run that is ready to train: a new one, or one that goes on; everything is checked before anything is written."""

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import optax

from jaxlm.analysis.expected import StepCost, check_memory, step_cost
from jaxlm.config import ExperimentConfig, SampleConfig, presets
from jaxlm.config.data import STDIN, as_paths
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.corpus import Corpus, identity, load_corpus, resolved
from jaxlm.data.tokenizer import Tokenizer, prompt_ids
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.partition import mesh_shape
from jaxlm.optim import build_optimizer
from jaxlm.optim.rounding import advise_float32
from jaxlm.run import changes, checkpoint
from jaxlm.run.epochs import with_steps
from jaxlm.run.folder import Run, check_data, check_vocabulary, new_folder, read_record, refuse_occupied, write_config
from jaxlm.run.init_from import (
    check_tokenizer,
    fitting_params,
    open_source,
    source_corpus,
    source_entry,
    with_source_settings,
)
from jaxlm.run.metrics import check_log, read_rows
from jaxlm.run.samples import check_samples
from jaxlm.sharding import processes
from jaxlm.sharding.layout import put_params
from jaxlm.training.step import TrainState, init_state
from jaxlm.types import Params


@dataclasses.dataclass(frozen=True)
class Session:
    """A run that is ready to train: everything has been checked, and its folder is there."""

    out: Path
    config: ExperimentConfig
    corpus: Corpus
    model: LanguageModel
    tx: optax.GradientTransformation
    state: TrainState
    cost: StepCost
    """What a step is expected to take."""
    saved_step: int | None = None
    """The step of the checkpoint that holds the state; None = there is none."""


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
    refuse_occupied(out)
    config, tokenizer = _with_data(config)
    processes.wait("out is checked")
    if init_from is not None:
        source = open_source(init_from)
        _check_tokenizer(tokenizer, source.tokenizer, source.path)
        return _session_from(source, config, out, keep_warmup, extend_positions)
    with processes.first_before_others("the corpus is read"):
        corpus = load_corpus(config.data, config.model.max_seq_len, tokenizer)
    config = _fit_length(config, corpus, keep_warmup)
    session = _session(_fit_vocabulary(config, corpus.tokenizer.vocab_size), out, corpus)
    with checkpoint.together(out, new_folder(out, session.config, corpus.tokenizer, corpus.sha256)):
        pass
    processes.wait("the folder is there")
    return session


def _session_from(
    source: Run, config: ExperimentConfig, out: Path, keep_warmup: bool, extend_positions: bool
) -> Session:
    """As `new_session`, with the weights and the vocabulary of a run. They are saved as checkpoint 0."""
    config = with_source_settings(config, source)
    check_tokenizer(config, source)
    config = _fit_vocabulary(config, source.config.model.vocab_size)
    params = fitting_params(source, config.model, extend_positions)
    with processes.first_before_others("the corpus is read"):
        corpus = source_corpus(config, source)
    config = _fit_length(config, corpus, keep_warmup)
    session, more = _session(config, out, corpus, params), {"init_from": source_entry(source)}
    own = new_folder(out, session.config, corpus.tokenizer, corpus.sha256, **more)
    with checkpoint.together(out, own) as folder:
        checkpoint.save(folder / "checkpoints", session.state, None, config.train.keep)
    processes.wait("the folder is there")
    return dataclasses.replace(session, saved_step=0)


def resumed_session(
    config: ExperimentConfig, out: Path, keep_schedule: bool = False, keep_warmup: bool = False
) -> Session:
    """Checks that a config continues the run in `out`, and restores its latest sound checkpoint.

    Raises:
      UserError: as `train`.
      CheckError: every checkpoint is damaged.
    """
    config, given = _with_data(config)
    record = read_record(out)
    stored_config, sha256 = record.config, record.corpus_sha256
    if sha256 is None:
        raise UserError(f"{out} was imported, not trained: there is no training to continue; use another --out")
    tokenizer = tokenizers.load(out / "tokenizer.json")
    _check_tokenizer(given, tokenizer, out)
    if not keep_warmup and config.optim.warmup_steps == _preset_warmup(
        config
    ):  # a new run may have shrunk it; `stored_config` knows
        optim = dataclasses.replace(config.optim, warmup_steps=stored_config.optim.warmup_steps)
        config = dataclasses.replace(config, optim=optim)
    check_vocabulary(out, tokenizer, record)
    config = _fit_vocabulary(config, stored_config.model.vocab_size)
    if keep_schedule:
        config = changes.with_schedule_of(config, stored_config)
    changes.check_same(config, stored_config, out, has_begun=any(checkpoint.steps(out / "checkpoints")))
    checkpoint.check_layers(out / "checkpoints", stored_config.model)
    with processes.first_before_others("the corpus is read"):
        check_data(identity(config.data), sha256)  # first: other data may have characters that the run does not know
        corpus = load_corpus(config.data, config.model.max_seq_len, tokenizer)
    config = with_steps(config, corpus)
    saved_steps = checkpoint.steps(out / "checkpoints")
    if saved_steps and saved_steps[-1] > config.train.steps:
        raise UserError(
            f"{out} already has {saved_steps[-1]} steps, more than steps = {config.train.steps}: give more steps or "
            "epochs"
        )
    session = _session(config, out, corpus)
    # Without a checkpoint the run was stopped before its first one, and begins again.
    restored = checkpoint.restore_latest(out / "checkpoints", session.state)
    if restored is None and record.init_from is not None:
        raise UserError(
            f"{out} has lost its checkpoints, the weights it began with too: start a new --out with "
            f"--init-from {record.init_from['run']}"
        )
    if restored is None and processes.first() and read_rows(out / "metrics.jsonl"):
        warnings.warn(f"{out} has no checkpoint: the run begins again with step 1", stacklevel=3)
    if restored is not None:
        state, damaged = restored
        saved_step = int(state.step)
        if processes.first():
            check_log(out / "metrics.jsonl", checkpoint.log_entry(out / "checkpoints" / str(saved_step)))
        for line in damaged:
            warnings.warn(f"{line}; resuming from step {saved_step}", stacklevel=3)
        session = dataclasses.replace(session, state=state, saved_step=saved_step)
    found = changes.changes(session.config, stored_config, session.saved_step or 0)
    changes.tell(found, session.config, stored_config, keep_schedule)
    more: dict[str, Any] = {"changes": [*record.changes, *found]} if record.changes or found else {}
    more |= {} if record.init_from is None else {"init_from": record.init_from}
    processes.wait("the run is read")
    if processes.first():
        write_config(out, session.config, corpus.sha256, **more)
    return session


def _with_data(config: ExperimentConfig) -> tuple[ExperimentConfig, Tokenizer | None]:
    """The config with data that can be found again (`corpus.resolved`), and the tokenizer that it names by a file.

    Raises:
      UserError: stdin is to be shared by several processes; or as `corpus.resolved`.
    """
    if processes.count() > 1 and STDIN in as_paths(config.data.path) + as_paths(config.data.val_path):
        raise UserError("data.path = '-' is stdin, which processes do not share: write the text to a file first")
    data, tokenizer = resolved(config.data)
    return dataclasses.replace(config, data=data), tokenizer


def _check_tokenizer(given: Tokenizer | None, own: Tokenizer, where: Path) -> None:
    """Refuses a tokenizer that is named by a file and is not the one of the model."""
    if given is not None and given.to_dict() != own.to_dict():
        raise UserError(f"data.tokenizer names another tokenizer than that of {where}, which stays: leave it out")


def _session(config: ExperimentConfig, out: Path, corpus: Corpus, params: Params | None = None) -> Session:
    """A session at step 0, with these parameters or else new ones. Nothing is written yet."""
    vocabulary = hashlib.sha256(json.dumps(corpus.tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()
    processes.check_same({"sha256 of the data": corpus.sha256, "sha256 of the tokenizer": vocabulary})
    config = fit_prompt(config, corpus.tokenizer)
    check_samples(config, corpus.tokenizer)
    corpus.check_lengths()
    model = build_model(config.model)
    cost = step_cost(config, mesh_shape(), corpus.train)
    check_memory(cost, config.train)
    params = init_params(model, jax.random.key(config.train.seed)) if params is None else put_params(model, params)
    tx = build_optimizer(config.optim, config.train.steps, params)
    advise_float32(config, params)
    return Session(out, config, corpus, model, tx, init_state(params, tx), cost)


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


def _fit_length(config: ExperimentConfig, corpus: Corpus, keep_warmup: bool) -> ExperimentConfig:
    """The config with the steps of its epochs, and a preset's warm-up that fits them."""
    config = with_steps(config, corpus)
    return config if keep_warmup else shrink_warmup(config)


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
        stacklevel=5,
    )
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=shorter))
