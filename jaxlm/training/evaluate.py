"""Exact evaluation of a split."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxlm.config import ExperimentConfig
from jaxlm.data.batches import EvalBatch, eval_batches
from jaxlm.data.corpus import Corpus
from jaxlm.errors import CheckError
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import token_losses
from jaxlm.types import Params

Evaluate = Callable[[Params, Iterable[EvalBatch]], float]


def make_evaluate(model: LanguageModel) -> Evaluate:
    """Compiles `evaluate(params, batches) -> mean loss in nats a token` over every target that has weight."""

    @jax.jit
    def sums(
        params: Params,
        windows: Integer[Array | np.ndarray, "groups B T1"],
        weights: Float[Array | np.ndarray, "groups B T"],
    ):
        def batch(_, pair):
            tokens, weight = pair[0].astype(jnp.int32), pair[1]
            logits, _ = model.apply({"params": params}, tokens[:, :-1])
            return None, (token_losses(logits, tokens[:, 1:]) * weight).sum()

        return jax.lax.scan(batch, None, (windows, weights))[1]

    def evaluate(params: Params, batches: Iterable[EvalBatch]) -> float:
        total, count = 0.0, 0.0
        for b in batches:
            total += np.asarray(sums(params, b.windows, b.weights), np.float64).sum()
            count += b.weights.sum(dtype=np.float64)
        return float(total / count)

    return evaluate


DIVERGED = 700.0
"""A loss above this many nats has no perplexity in float64."""


class Evaluation:
    """Exact losses over the validation split and over a training slice as long (of as many tokens, or rows)."""

    def __init__(self, model: LanguageModel, corpus: Corpus, config: ExperimentConfig) -> None:
        self._loss = make_evaluate(model)
        self._splits = {"val_loss": corpus.val, "train_loss": corpus.train[: len(corpus.val)]}
        self._shape = config.model.max_seq_len, 4 * config.train.batch_size // config.train.grad_accum
        self._pad_token = corpus.tokenizer.pad_token

    def __call__(self, params: Params) -> dict[str, float]:
        """val_loss, train_loss (nats a token) and perplexity.

        Raises:
          CheckError: a loss that is no number or too large for a perplexity.
        """
        losses = {
            name: self._loss(params, eval_batches(tokens, *self._shape, pad_token=self._pad_token))
            for name, tokens in self._splits.items()
        }
        if not all(loss < DIVERGED for loss in losses.values()):
            raise CheckError(f"the model has diverged: {losses}; lower --optim.learning-rate")
        return {**losses, "perplexity": math.exp(losses["val_loss"])}
