"""Bigram models: the next token from the last one alone."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.config import ModelConfig
from jaxlm.model.cache import checked_past
from jaxlm.model.layers import Dropout, LanguageModel, split, table_init
from jaxlm.ops import wide_gradients
from jaxlm.ops.attention import softcap
from jaxlm.ops.partition import constrain, gathered
from jaxlm.types import Logits, Tokens


class Bigram(LanguageModel):
    """The logits of the next token are a row of a V x V table, chosen by the last token. The cache is empty."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: Any = None,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, tuple[()] | None]:
        """See LanguageModel."""
        cfg = self.cfg
        shape = (cfg.vocab_size, cfg.vocab_size)
        axes = ("vocab_rows", "vocab")
        table = self.param("table", split(table_init(cfg), *axes), shape, jnp.dtype(cfg.param_dtype))
        logits = wide_gradients.look_up(gathered(table, *axes), tokens).astype(cfg.dtype)
        logits = constrain(logits, "batch", None, "vocab")
        logits = softcap(logits.astype(jnp.promote_types(cfg.dtype, jnp.float32)), cfg.final_softcap)
        return logits, _new_cache(cfg, tokens, cache)


class EmbeddingBigram(LanguageModel):
    """A bigram through D features: embedding, dropout, vocabulary head. The cache is empty."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: Any = None,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, tuple[()] | None]:
        """See LanguageModel."""
        x, table = self._embed(tokens, train)
        x = Dropout(self.cfg.dropout)(x, train)
        return self._logits(x, table), _new_cache(self.cfg, tokens, cache)


def _new_cache(cfg: ModelConfig, tokens: Tokens, cache: Any) -> tuple[()] | None:
    return None if checked_past(cfg, len(tokens), cache, tuple) is None else ()
