"""Exact evaluation of a split."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxlm.config import ExperimentConfig
from jaxlm.data.batches import EVAL_GROUPS, EvalBatch, Split, TokenStream, num_bytes
from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.corpus import Corpus, document_end
from jaxlm.data.document_tokens import document_bytes
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import CheckError
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import token_losses
from jaxlm.ops.partition import constrain
from jaxlm.training.step import packing
from jaxlm.types import Params

Evaluate = Callable[[Params, Iterable[EvalBatch]], float]

Report = Callable[[int, int], None]
"""Called as evaluation advances: targets done, targets in all."""

CALL_FLOPS = 4e11
"""About how much one call of the compiled evaluation computes, seconds on a slow CPU, unless a single batch is more."""

DIVERGED = 700.0
"""A loss above this many nats has no perplexity in float64."""


def make_sums(model: LanguageModel, document_end: int | None = None) -> Callable[..., Float[Array, "groups B"]]:
    """Compiles `sums(params, windows, weights)`: the weighted sum of the losses of each row, in nats.

    Args:
      document_end: as in `training.step.batch_loss`.
    """

    @jax.jit
    def sums(
        params: Params,
        windows: Integer[Array | np.ndarray, "groups B T1"],
        weights: Float[Array | np.ndarray, "groups B T"],
    ):
        def batch(_, pair):
            tokens, weight = constrain(pair[0].astype(jnp.int32), "batch", None), pair[1]
            logits, _ = model.apply({"params": params}, tokens[:, :-1], **packing(tokens[:, :-1], document_end))
            rows = (token_losses(logits, tokens[:, 1:]) * weight).sum(axis=1)
            return None, constrain(rows, None)  # each process gets all of them

        return jax.lax.scan(batch, None, (windows, weights))[1]

    return sums


def make_evaluate(model: LanguageModel, document_end: int | None = None) -> Evaluate:
    """Compiles `evaluate(params, batches) -> mean loss in nats a token` over every target that has weight."""
    sums = make_sums(model, document_end)

    def evaluate(params: Params, batches: Iterable[EvalBatch]) -> float:
        total, count = 0.0, 0.0
        for b in batches:
            # Sums of a row are float32; the sum over all rows is float64, for any size of split and any mesh.
            total += np.asarray(sums(params, b.windows, b.weights), np.float64).sum()
            count += b.weights.sum(dtype=np.float64)
        return float(total / count)

    return evaluate


def eval_batch_size(config: ExperimentConfig) -> int:
    """Windows that are evaluated at once: up to four micro-batches, as many as need less memory than training one.

    More at once are faster on a CPU. A mesh that divides a micro-batch divides them too.
    """
    cfg = config.model
    # Bytes a token, about. Training keeps the logits and some 16 D of each layer, or with remat of one layer and the
    # inputs of the others. A forward pass has the logits, their exponentials, and some 6 D of one layer at a time.
    width = cfg.embed_dim * (2 if cfg.dtype == "bfloat16" else 4)
    logits, layers = 4 * cfg.vocab_size, width * (16 + cfg.num_layers if cfg.remat else 16 * cfg.num_layers)
    times = next((times for times in (4, 2) if times * (2 * logits + 6 * width) <= logits + layers), 1)
    return times * config.train.batch_size // config.train.grad_accum


def eval_groups(config: ExperimentConfig, params: Params) -> int:
    """Batches that one call of the compiled evaluation reads, at most: between two calls Python looks at signals.

    Args:
      params: the parameters, or their shapes.
    """
    forward = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))  # FLOPs a token, without attention
    return min(max(1, int(CALL_FLOPS / (forward * eval_batch_size(config) * config.model.max_seq_len))), EVAL_GROUPS)


def check_converged(losses: dict[str, float]) -> None:
    """Refuses losses without a perplexity.

    Raises:
      CheckError: a loss is not a number, or is too large for a perplexity.
    """
    if not all(loss < DIVERGED for loss in losses.values()):
        raise CheckError(f"the model has diverged: {losses}; lower --optim.learning-rate")


def count_bytes(split: Split, tokenizer: Tokenizer) -> int | None:
    """Bytes of the UTF-8 text that the targets of a split spell; None if they spell none."""
    if isinstance(split, TokenStream) and split.document_end is not None and isinstance(tokenizer, BPETokenizer):
        token_bytes = document_bytes(tokenizer, split.document_end)
        return None if token_bytes is None else num_bytes(split, token_bytes) or None
    token_bytes = tokenizer.token_bytes()
    return None if token_bytes is None else max(num_bytes(split, token_bytes) - tokenizer.added_bytes, 0) or None


def text_measures(loss: float, targets: int, text_bytes: int | None) -> dict[str, float]:
    """Perplexity and bits_per_byte of a mean loss in nats a token.

    bits_per_byte is the loss of all targets in bits over the bytes of their text, so it compares models with different
    tokenizers. It is left out if the bytes are not known.
    """
    measures = {"perplexity": math.exp(loss)}
    if text_bytes is not None:
        measures["bits_per_byte"] = loss / math.log(2) * targets / text_bytes
    return measures


class Evaluation:
    """Losses over the validation split and over the start of the training split, as long (in tokens or rows).

    They are exact. With `eval_batches` they are estimates from so many batches of train.batch_size windows, spread
    evenly over each split, the same ones each time.
    """

    def __init__(
        self, model: LanguageModel, corpus: Corpus, config: ExperimentConfig, eval_batches: int | None = None
    ) -> None:
        self._loss = make_evaluate(model, document_end(config.data, corpus.val))
        self._splits = {"val_loss": corpus.val, "train_loss": corpus.train.head(len(corpus.val))}
        self._config, self._batch_size = config, eval_batch_size(config)
        self._most = None if eval_batches is None else eval_batches * config.train.batch_size
        if self._most is not None and self._most >= corpus.val.num_windows:
            self._most = eval_batches = None
        self.eval_batches = eval_batches
        """Of an estimate, the batches that it comes from; None = all, and it is exact."""
        self._targets = {name: split.num_targets for name, split in self._splits.items()}
        self._text_bytes = count_bytes(corpus.val, corpus.tokenizer)

    def __call__(self, params: Params, report: Report | None = None) -> dict[str, float]:
        """val_loss and train_loss (nats a token), and of val_loss what `text_measures` says.

        Of an estimate also eval_batches, the number of batches that it comes from.

        Raises:
          CheckError: as `check_converged`.
        """
        done, total = 0.0, sum(self._targets.values())
        groups = eval_groups(self._config, params)
        if self._most is not None:
            total = sum(round(self._most * split.targets_per_window) for split in self._splits.values())

        def reported(batches: Iterator[EvalBatch]) -> Iterator[EvalBatch]:
            nonlocal done
            for batch in batches:
                yield batch
                done += float(batch.weights.sum(dtype=np.float64))
                if report is not None:
                    report(min(int(done), total), total)

        losses = {
            name: self._loss(params, reported(split.eval_batches(self._batch_size, groups, self._most)))
            for name, split in self._splits.items()
        }
        check_converged(losses)
        estimate: dict[str, Any] = {} if self.eval_batches is None else {"eval_batches": self.eval_batches}
        return {**losses, **text_measures(losses["val_loss"], self._targets["val_loss"], self._text_bytes), **estimate}
