"""The key/value cache: explicit state that goes in and comes out.

A layer with window W keeps min(capacity, W) slots; position p lives in slot p mod that number (a ring). What a
slot holds is known from its stored position alone, so masks need nothing else.
"""

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError


class LayerCache(NamedTuple):
    """One layer's keys and values, C slots a row. Position -1 marks an empty slot."""

    keys: Float[Array, "B C K H"]
    values: Float[Array, "B C K Hv"]
    positions: Int[Array, "B C"]

    def write(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K Hv"], positions: Int[Array, "B T"]
    ) -> "LayerCache":
        """Stores new tokens; of those that share a slot the latest stays. Position -1 (padding) is not stored."""
        capacity = self.positions.shape[1]
        newest = positions.max(axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > newest - capacity)
        slots = jnp.where(kept, positions % capacity, capacity)  # one past the end: dropped
        rows = jnp.arange(positions.shape[0])[:, None]
        return LayerCache(
            keys=self.keys.at[rows, slots].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[rows, slots].set(values.astype(self.values.dtype), mode="drop"),
            positions=self.positions.at[rows, slots].set(positions, mode="drop"),
        )

    def in_order(self) -> "LayerCache":
        """The slots sorted by position: empty ones, then the oldest to the latest."""
        order = jnp.argsort(self.positions, axis=1)
        rows = jnp.arange(order.shape[0])[:, None]
        return LayerCache(self.keys[rows, order], self.values[rows, order], self.positions[rows, order])


class KVCache(NamedTuple):
    """The state of cached decoding: every layer's slots, and the position each row's next token takes."""

    layers: tuple[LayerCache, ...]
    next_position: Int[Array, " B"]


class RecurrentCache(NamedTuple):
    """Each layer's hidden state [B, D]; an LSTM layer has the pair (cell state, hidden state)."""

    layers: tuple[Any, ...]


Cache: TypeAlias = KVCache | RecurrentCache | tuple[()]
"""The state of any family: bigrams keep none."""


def init_cache(cfg: ModelConfig, batch_size: int, capacity: int) -> Cache:
    """An empty cache for `batch_size` rows.

    Args:
      capacity: slots of an unwindowed attention layer, in tokens. Past it the oldest keys are overwritten, so the
        model is the one whose every window is min(W, capacity). Other families' caches have one size.

    Raises:
      ValueError: batch_size or capacity below 1, or a capacity that a learned position table cannot reach.
    """
    if batch_size < 1 or capacity < 1:
        raise UserError(f"batch_size = {batch_size} and capacity = {capacity}: give at least 1 of each")
    if cfg.has_position_table and capacity > cfg.max_seq_len:
        raise UserError(
            f"capacity = {capacity} is beyond the learned position table: give at most max_seq_len = {cfg.max_seq_len}"
        )
    dtype = jnp.dtype(cfg.dtype)
    if cfg.family == "recurrent":
        return zero_state(cfg, batch_size)
    if cfg.family != "transformer":
        return ()

    def layer(window: int | None) -> LayerCache:
        slots = capacity if window is None else min(capacity, window)
        return LayerCache(
            keys=jnp.zeros((batch_size, slots, cfg.kv_heads, cfg.head_width), dtype),
            values=jnp.zeros((batch_size, slots, cfg.kv_heads, cfg.value_width), dtype),
            positions=jnp.full((batch_size, slots), -1, jnp.int32),
        )

    return KVCache(layers=tuple(map(layer, cfg.layer_windows)), next_position=jnp.zeros(batch_size, jnp.int32))


def zero_state(cfg: ModelConfig, batch_size: int) -> RecurrentCache:
    """The hidden states of a recurrent model before its first token."""
    state = jnp.zeros((batch_size, cfg.embed_dim), jnp.dtype(cfg.dtype))
    return RecurrentCache(((state, state) if cfg.cell == "lstm" else state,) * cfg.num_layers)
