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
    """One layer's keys and values, C slots a row. Position -1 marks an empty slot.

    Stored is the layout in which a step reads fastest (docs/log.md): the slots of a key's feature, and the features
    of a slot's value, lie side by side. `keys` and `values` show them as [B, C, K, H].
    """

    stored_keys: Float[Array, "B K H C"]
    stored_values: Float[Array, "B K C Hv"]
    positions: Int[Array, "B C"]

    @property
    def keys(self) -> Float[Array, "B C K H"]:
        """The keys slot by slot."""
        return jnp.transpose(self.stored_keys, (0, 3, 1, 2))

    @property
    def values(self) -> Float[Array, "B C K Hv"]:
        """The values slot by slot."""
        return jnp.transpose(self.stored_values, (0, 2, 1, 3))

    @property
    def slots(self) -> int:
        """C: how many tokens it can hold."""
        return self.positions.shape[1]

    def write(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K Hv"], positions: Int[Array, "B T"]
    ) -> "LayerCache":
        """Stores new tokens; of those that share a slot the latest stays. Position -1 (padding) is not stored."""
        rows = jnp.arange(positions.shape[0])[:, None]
        if positions.shape == (1, 1):  # twice, for XLA:CPU updates a lone slot in a copy of the whole cache
            keys, values, positions = (jnp.repeat(x, 2, axis=1) for x in (keys, values, positions))
        newest = positions.max(axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > newest - self.slots)
        slots = jnp.where(kept, positions % self.slots, self.slots)  # one past the end: dropped
        return LayerCache(
            self.stored_keys.at[rows, :, :, slots].set(keys.astype(self.stored_keys.dtype), mode="drop"),
            self.stored_values.at[rows, :, slots].set(values.astype(self.stored_values.dtype), mode="drop"),
            self.positions.at[rows, slots].set(positions, mode="drop"),
        )

    def in_order(self) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K Hv"], Int[Array, "B C"]]:
        """Keys, values and positions sorted by position: empty slots, then the oldest to the latest."""
        order = jnp.argsort(self.positions, axis=1)
        rows = jnp.arange(order.shape[0])[:, None]
        return self.keys[rows, order], self.values[rows, order], self.positions[rows, order]

    def grown(self, slots: int) -> "LayerCache":
        """The same with more slots; right as long as none was written twice."""
        more = slots - self.slots
        return LayerCache(
            jnp.pad(self.stored_keys, ((0, 0), (0, 0), (0, 0), (0, more))),
            jnp.pad(self.stored_values, ((0, 0), (0, 0), (0, more), (0, 0))),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
        )


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
    cfg.check_reach(capacity, "give a smaller capacity")
    dtype = jnp.dtype(cfg.dtype)
    if cfg.family == "recurrent":
        return zero_state(cfg, batch_size)
    if cfg.family != "transformer":
        return ()

    def layer(window: int | None) -> LayerCache:
        slots = _slots(capacity, window)
        return LayerCache(
            jnp.zeros((batch_size, cfg.kv_heads, cfg.head_width, slots), dtype),
            jnp.zeros((batch_size, cfg.kv_heads, slots, cfg.value_width), dtype),
            jnp.full((batch_size, slots), -1, jnp.int32),
        )

    return KVCache(layers=tuple(map(layer, cfg.layer_windows)), next_position=jnp.zeros(batch_size, jnp.int32))


def grow_cache(cfg: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """The same cache with a larger capacity; exact as long as no row has more tokens than the old one."""
    if not isinstance(cache, KVCache):
        return cache
    layers = zip(cache.layers, cfg.layer_windows, strict=True)
    return cache._replace(layers=tuple(layer.grown(_slots(capacity, window)) for layer, window in layers))


def zero_state(cfg: ModelConfig, batch_size: int) -> RecurrentCache:
    """The hidden states of a recurrent model before its first token."""
    state = jnp.zeros((batch_size, cfg.embed_dim), jnp.dtype(cfg.dtype))
    return RecurrentCache(((state, state) if cfg.cell == "lstm" else state,) * cfg.num_layers)


def _slots(capacity: int, window: int | None) -> int:
    return capacity if window is None else min(capacity, window)
