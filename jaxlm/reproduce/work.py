"""Doing one row of an experiment under one seed: once, and resumed where it was stopped."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.config import ExperimentConfig
from jaxlm.data.files import staged
from jaxlm.errors import ContextWarning, UserError
from jaxlm.reproduce.records import folder_of, locked, new_record, read_record, write_record
from jaxlm.reproduce.rows import Experiment, Measurement, Numbers, Row, Training

if TYPE_CHECKING:
    from jaxlm.run.folder import Run

Job = tuple[Row, int]
"""A row and a seed."""


class StoppedError(Exception):
    """A signal ended a training before its last step; its checkpoint is safe."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


def jobs_of(experiment: Experiment, names: list[str], seeds: list[int] | None) -> list[Job]:
    """The chosen rows under the chosen seeds, each after those that it needs.

    Args:
      names: of rows; none = all.
      seeds: None = each row's own.

    Raises:
      UserError: a row that the experiment does not have.
    """
    wanted = [experiment.row(name) for name in names] or list(experiment.rows)
    jobs: dict[tuple[str, int], Row] = {}

    def add(row: Row, seed: int) -> None:
        for name in row.needs:
            add(experiment.row(name), seed)
        jobs.setdefault((row.name, seed), row)

    for row in wanted:
        for seed in seeds if seeds is not None and isinstance(row, Training) else row.seeds:
            add(row, seed)
    return [(row, seed) for (_, seed), row in jobs.items()]


def perform(exp: Experiment, row: Row, seed: int, root: Path, quick: bool) -> None:
    """Trains or measures a row under a seed and keeps its record. What is done already is not done again.

    Raises:
      StoppedError: a signal came.
      UserError: as `jaxlm.train`; another process is at the same row; a training for an accelerator on a CPU.
    """
    with locked(root, row.name, seed):
        if read_record(exp, root, row, seed, quick) is not None:
            return
        if isinstance(row, Measurement):
            started = time.perf_counter()
            numbers = row.measure(quick)
            seconds = time.perf_counter() - started
        else:
            assert isinstance(row, Training)
            with _compiled_quickly() if quick else contextlib.nullcontext():
                numbers, seconds = _train(row, seed, root, quick)
        write_record(folder_of(root, row.name, seed), new_record(exp, row, seed, quick, seconds, numbers))


@contextlib.contextmanager
def _compiled_quickly() -> Iterator[None]:
    """Programs are compiled with hardly any optimization: six steps take less time than compiling them well."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _train(row: Training, seed: int, root: Path, quick: bool) -> tuple[Numbers, float]:
    import jax

    from jaxlm.run.training import train

    if row.accelerator and not quick and jax.default_backend() == "cpu":
        raise UserError(f"row {row.name} needs an accelerator (days on a CPU): run it on one, or try it with --quick")
    folder = folder_of(root, row.name, seed)
    config = row.seeded(seed)
    if quick:
        config = quick_config(config, root)
    resume = (folder / "config.json").exists()
    if resume:
        _check_settings(folder, config)
    source = None if row.init_from is None or resume else folder_of(root, row.init_from, seed)
    outcome = train(
        config, folder, resume, keep_warmup=True, init_from=source, extend_positions=row.extend_positions and not resume
    )
    if outcome.signum is not None:
        raise StoppedError(outcome.signum)
    return _results(row, seed, folder, root)


def _check_settings(folder: Path, config: ExperimentConfig) -> None:
    """Refuses to go on with other settings, which a run may do, but not one whose numbers stand in a table.

    Raises:
      UserError: the message names the first setting.
    """
    from jaxlm.run.changes import changes
    from jaxlm.run.folder import read_config

    for change in changes(config, read_config(folder), 0):
        if change["field"] != "train.steps":
            raise UserError(
                f"{folder} was trained with {change['field']} = {change['from']!r}, not {change['to']!r}: move it away"
            )


def _results(row: Training, seed: int, folder: Path, root: Path) -> tuple[Numbers, float]:
    """The numbers of a finished training, and the seconds that it took."""
    import jax

    from jaxlm.optim import build_optimizer, state_bytes
    from jaxlm.run.folder import load_run
    from jaxlm.run.metrics import read_rows

    rows = read_rows(folder / "metrics.jsonl")
    evaluations = [entry for entry in rows if "val_loss" in entry]
    run = load_run(folder, evaluations[-1]["step"])
    tx = build_optimizer(run.config.optim, run.config.train.steps, run.params)
    curve = [[entry["step"], entry["train_loss"], entry["val_loss"]] for entry in evaluations]
    if row.init_from is not None:
        start = _start_losses(run, load_run(folder_of(root, row.init_from, seed)), row.extend_positions)
        curve = [[0, start["train_loss"], start["val_loss"]], *curve]
    numbers: Numbers = {
        "val_loss": evaluations[-1]["val_loss"],
        "train_loss": evaluations[-1]["train_loss"],
        "last_loss": [entry["loss"] for entry in rows if "loss" in entry][-1],
        "perplexity": evaluations[-1]["perplexity"],
        "best_val_loss": min(entry["val_loss"] for entry in evaluations),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "state_bytes": state_bytes(tx, run.params),
        "curve": curve,
        **({} if row.init_from is None else {"start_loss": curve[0][2]}),
        "samples": {prompt: sample_of(run, prompt) for prompt in row.prompts},
    }
    if row.measure is not None:
        numbers |= row.measure(run, lambda name: folder_of(root, name, seed))
    return numbers, rows[-1]["elapsed_s"]


def _start_losses(run: "Run", source: "Run", extend_positions: bool) -> dict[str, float]:
    """The losses of the weights that a run began with, under its own config."""
    from jaxlm.data.corpus import load_corpus
    from jaxlm.run.init_from import fitting_params
    from jaxlm.training.evaluate import Evaluation

    params = fitting_params(source, run.model.cfg, extend_positions)
    corpus = load_corpus(run.config.data, run.model.cfg.max_seq_len, run.tokenizer)
    return Evaluation(run.model, corpus, run.config)(params)


def sample_of(run: "Run", prompt: str) -> str:
    """What a trained model makes of a prompt: at most 300 tokens.

    Raises:
      UserError: as `jaxlm.run.samples.sample`.
    """
    from jaxlm.run.samples import sample

    length = min(300, run.config.sample.max_new_tokens)
    config = dataclasses.replace(run.config.sample, prompt=prompt, num_samples=1, max_new_tokens=length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)  # long samples are expected here
        return sample(run, config)[0]


QUICK_TEXT, QUICK_ROWS = 12_000, 40
"""A quick version reads so many characters, or so many transcripts of each split."""


def quick_config(config: ExperimentConfig, root: Path) -> ExperimentConfig:
    """The same training in seconds: one layer, a quarter of the context, 6 steps of 2 rows, a little text."""
    from jaxlm.data.batches import TokenStream
    from jaxlm.data.corpus import load_corpus, read_transcripts
    from jaxlm.data.tokenizer import TranscriptTokenizer

    folder, model, data = root / "quick-data", config.model, config.data

    def written(name: str, text: str) -> str:
        """The absolute path of a file with this text; several processes may write it at once."""
        with staged(folder / name) as path:
            path.write_text(text, encoding="utf-8")
        return str((folder / name).absolute())

    if data.tokenizer == "transcript":
        read, alphabet = read_transcripts(data), TranscriptTokenizer()
        paths = []
        for name, rows in (("train.csv", read.train), ("val.csv", read.val)):
            lines = [f"{number},{alphabet.decode(row.tolist())}" for number, row in enumerate(rows[:QUICK_ROWS])]
            paths.append(written(name, "\n".join(["id,transcript", *lines]) + "\n"))
        data = dataclasses.replace(data, path=paths[0], val_path=paths[1])
    else:
        corpus = load_corpus(data, model.max_seq_len)
        assert isinstance(corpus.train, TokenStream)
        text = corpus.tokenizer.decode(corpus.train.tokens[:QUICK_TEXT].tolist())
        data = dataclasses.replace(data, path=written("text.txt", text))
        model = dataclasses.replace(model, max_seq_len=model.max_seq_len // 4)
    if model.family in ("transformer", "recurrent"):
        model = dataclasses.replace(model, num_layers=1)
    optim = dataclasses.replace(config.optim, warmup_steps=min(2, config.optim.warmup_steps))
    train = dataclasses.replace(
        config.train, steps=6, batch_size=2, grad_accum=1, log_every=2, eval_every=3, checkpoint_every=6
    )
    sample = dataclasses.replace(config.sample, max_new_tokens=20)
    return dataclasses.replace(config, model=model, data=data, optim=optim, train=train, sample=sample)
