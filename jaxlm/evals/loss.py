"""Exact losses of a run, on its own data or on another text."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxlm.config.data import Paths, as_paths
from jaxlm.data import corpus
from jaxlm.errors import UserError
from jaxlm.run.folder import Run, check_data, check_named
from jaxlm.training.evaluate import (
    Evaluation,
    Report,
    check_converged,
    count_bytes,
    eval_batch_size,
    eval_groups,
    make_evaluate,
    text_measures,
)


def evaluate(
    run: Run, path: Paths | Path = None, val_path: Paths | Path = None, report: Report | None = None
) -> dict[str, Any]:
    """Exact losses, nats per token, over every target of a text.

    Without a path, or if it leads to the run's own data (known by their sha256): val_loss, perplexity and bits_per_byte
    over the validation split, and train_loss over the start of the training split. If it leads to other data: loss,
    perplexity and bits_per_byte over all of them, with the run's tokenizer. bits_per_byte counts the bytes of the UTF-8
    text of the targets.

    Args:
      path: a text, or transcripts if the run was trained on transcripts, in the forms of `DataConfig.path`.
      val_path: where the run's own held-out data are now.
      report: called with the targets done and all targets, as the evaluation of the run's own data goes on.

    Raises:
      UserError: data that are missing, have characters unknown to the run, or are too short for one target; a
        `val_path` that is not of the run.
    """
    if path is None and val_path is None:
        return _evaluate_own(run, report)
    config = run.config.with_data_at(path, val_path)
    config = dataclasses.replace(config, data=corpus.resolved(config.data)[0])  # stdin is read once
    if corpus.identity(config.data) == run.corpus_sha256:
        return _evaluate_own(dataclasses.replace(run, config=config), report)
    if path is None or val_path is not None:
        held_out = ", ".join(as_paths(config.data.val_path))
        raise UserError(
            f"--data.val-path {held_out} is not the held-out data of {run.path}: evaluate other data by --data.path "
            "alone"
        )
    return _evaluate_other(dataclasses.replace(run, config=config))


def _evaluate_own(run: Run, report: Report | None) -> dict[str, Any]:
    check_named(run)
    data = run.config.data
    if run.corpus_sha256 is not None:  # first: other data may have characters that the run does not know
        check_data(corpus.identity(data), run.corpus_sha256)
    splits = corpus.load_corpus(data, run.config.model.max_seq_len, run.tokenizer)
    losses = Evaluation(run.model, splits, run.config)(run.params, report)
    where = {"data": data.name, "split": "validation"}
    return {"step": run.step, **where, **losses, "val_targets": splits.val.num_targets}


def _evaluate_other(run: Run) -> dict[str, Any]:
    """The losses over all of the data at the config's path."""
    data = run.config.data
    split = corpus.load_unsplit(data, run.config.model.max_seq_len, run.tokenizer)
    split.check_evaluation(f"text {data.name}", "give a longer one")
    evaluate = make_evaluate(run.model, corpus.document_end(data, split))
    batches = split.eval_batches(eval_batch_size(run.config), eval_groups(run.config, run.params))
    loss = evaluate(run.params, batches)
    check_converged({"loss": loss})
    measures = text_measures(loss, split.num_targets, count_bytes(split, run.tokenizer))
    where = {"data": data.name, "split": "all"}
    return {"step": run.step, **where, "loss": loss, **measures, "targets": split.num_targets}
