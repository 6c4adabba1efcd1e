"""Exact losses of a run."""

from jaxlm.data.batches import count_targets
from jaxlm.data.corpus import load_corpus
from jaxlm.run.folder import Run, check_data, check_named
from jaxlm.training.evaluate import Evaluation


def evaluate(run: Run) -> dict[str, float | int]:
    """Exact losses of a run: val_loss and perplexity over the validation split, train_loss over the fixed slice."""
    check_named(run)
    corpus = load_corpus(run.config.data, run.tokenizer, run.config.model.max_seq_len)
    check_data(corpus.sha256, run.corpus_sha256)
    losses = Evaluation(run.model, corpus, run.config)(run.params)
    return {"step": run.step, **losses, "val_targets": count_targets(corpus.val, corpus.tokenizer.pad_token)}
