"""Recurrent networks with the transformer's interface: the hidden states are the cache."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from jaxlm.model.cache import RecurrentCache, checked_past, zero_state
from jaxlm.model.layer_stack import apply_layers
from jaxlm.model.layers import Dropout, LanguageModel, bias_init, weight_init
from jaxlm.types import Logits, Tokens


def slide(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """min(1, max(0, a))."""
    return jnp.clip(a, 0, 1)


CELL_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "slide": slide}


class RecurrentLayer(nn.Module):
    """One Linen cell over the sequence, then dropout. Padding leaves the state unchanged."""

    cfg: ModelConfig
    layer: LayerSettings

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: Any, train: bool
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The hidden state of every token, and that of the last real token as the new cache."""
        cell = self._cell()

        def step(cell: nn.RNNCellBase, state: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
            token, real = inputs
            new, out = cell(state, token)
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, state), out

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        state, out = scan(cell, cache, (x, positions[..., None] >= 0))
        return Dropout(self.cfg.dropout)(out, train), state

    @nn.nowrap
    def _cell(self) -> nn.RNNCellBase:
        cfg = self.cfg
        make: Any = {"elman": nn.SimpleCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[cfg.cell]
        if cfg.cell == "elman":
            make = functools.partial(make, activation_fn=CELL_ACTIVATIONS[cfg.cell_activation])
        return make(
            features=cfg.embed_dim,
            kernel_init=weight_init(cfg, cfg.embed_dim),
            recurrent_kernel_init=weight_init(cfg, cfg.embed_dim),
            bias_init=bias_init(cfg, cfg.embed_dim),
            dtype=jnp.dtype(cfg.dtype),
            param_dtype=jnp.dtype(cfg.param_dtype),
            name="cell",
        )


class Recurrent(LanguageModel):
    """Embedding, L recurrent layers of width D, vocabulary head; the hidden states are the cache.

    Sources: Elman 1990 (Cognitive Science 14); LSTM: Hochreiter & Schmidhuber 1997 (Neural Computation 9); GRU: Cho et
    al. 2014, https://arxiv.org/abs/1406.1078. The cells are Linen's: an LSTM has one bias for each gate (torch: two).
    """

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: Any = None,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, RecurrentCache | None]:
        """See LanguageModel."""
        cfg = self.cfg
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        if lengths is not None:
            positions = jnp.where(positions < lengths[:, None], positions, -1)
        x, table = self._embed(tokens, train)
        x = Dropout(cfg.dropout)(x, train)
        cache = checked_past(cfg, batch, cache, RecurrentCache)
        state = cache if isinstance(cache, RecurrentCache) else zero_state(cfg, batch)
        x, layers = apply_layers(RecurrentLayer, cfg, x, positions, state.layers, train)
        return self._logits(x, table), None if cache is None else RecurrentCache(layers)
