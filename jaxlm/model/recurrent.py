"""Recurrent networks with the transformer's interface: the hidden states are the cache."""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from jaxlm.model.cache import RecurrentCache, checked_past, zero_state
from jaxlm.model.layer_stack import apply_layers
from jaxlm.model.layers import Dropout, LanguageModel, bias_init, split, weight_init
from jaxlm.ops.partition import gathered, locally
from jaxlm.types import Logits, Tokens


def slide(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """min(1, max(0, a))."""
    return jnp.clip(a, 0, 1)


CELL_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "slide": slide}


KERNEL = ("embed", "hidden")
"""The logical axes of the kernels of a cell."""


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
        if self.is_initializing():
            cell(cache, x[:, 0])
        own = cell.clone(parent=None, name=None)

        def over_time(x, real, state, params):
            def step(state: Any, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
                token, real = inputs
                new, out = cast(Any, own.apply)({"params": params}, state, token)
                return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, state), out

            state, out = jax.lax.scan(step, state, (x.swapaxes(0, 1), real.swapaxes(0, 1)))
            return out.swapaxes(0, 1), state

        # On a mesh each device has its own rows and all of the parameters: nothing is sent between two tokens.
        params = jax.tree.map(
            lambda leaf: gathered(leaf, *KERNEL) if leaf.ndim == 2 else leaf,
            nn.unbox(self.variables["params"]["cell"]),
        )
        rows, state_rows = ("batch", None, None), jax.tree.map(lambda _: ("batch", None), cache)
        whole = jax.tree.map(lambda leaf: (None,) * leaf.ndim, params)
        scan = locally(over_time, (rows, rows, state_rows, whole), (rows, state_rows))
        out, state = scan(x, positions[..., None] >= 0, cache, params)
        return Dropout(self.cfg.dropout)(out, train), state

    @nn.nowrap
    def _cell(self) -> nn.RNNCellBase:
        cfg = self.cfg
        make: Any = {"elman": nn.SimpleCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[cfg.cell]
        if cfg.cell == "elman":
            make = functools.partial(make, activation_fn=CELL_ACTIVATIONS[cfg.cell_activation])
        return make(
            features=cfg.embed_dim,
            kernel_init=split(weight_init(cfg, cfg.embed_dim), *KERNEL),
            recurrent_kernel_init=split(weight_init(cfg, cfg.embed_dim), *KERNEL),
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
