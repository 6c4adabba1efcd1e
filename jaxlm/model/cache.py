"""The key/value cache: explicit state that a call takes and returns.

A layer with window W keeps min(capacity, W) slots in a ring: position p lives in slot p mod their number. Each slot
stores its position, and masks are computed from these positions alone.
"""

import numbers
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.ops.partition import constrain


class KeyValues(NamedTuple):
    """Some keys and values with their absolute positions; -1 marks padding or an empty slot."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K Hv"]
    positions: Int[Array, "#B S"]


class LayerCache(NamedTuple):
    """One layer's keys and values, C slots a row. Position -1 marks an empty slot.

    They are stored in the layout that a decoding step reads fastest (docs/log.md): the slots of one key feature are
    contiguous, and so are the features of one value. `keys` and `values` show them as [B, C, K, H].
    """

    stored_keys: Float[Array, "B K H C"]
    stored_values: Float[Array, "B K C Hv"]
    positions: Int[Array, "B C"]

    @property
    def keys(self) -> Float[Array, "B C K H"]:
        """The keys slot by slot."""
        return rearrange(self.stored_keys, "b kv width slots -> b slots kv width")

    @property
    def values(self) -> Float[Array, "B C K Hv"]:
        """The values slot by slot."""
        return rearrange(self.stored_values, "b kv slots width -> b slots kv width")

    @property
    def slots(self) -> int:
        """C: how many tokens it can hold."""
        return self.positions.shape[1]

    def write(
        self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K Hv"], positions: Int[Array, "B T"]
    ) -> "LayerCache":
        """Stores new tokens. Of those that share a slot the latest stays; position -1 (padding) is not stored."""
        rows = jnp.arange(positions.shape[0])[:, None]
        if positions.shape == (1, 1):  # written twice: XLA:CPU would copy the whole cache to update a single slot
            keys, values, positions = (jnp.repeat(x, 2, axis=1) for x in (keys, values, positions))
        newest = positions.max(axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > newest - self.slots)
        slots = jnp.where(kept, positions % self.slots, self.slots)  # one past the end: dropped
        return LayerCache(
            self.stored_keys.at[rows, :, :, slots].set(keys.astype(self.stored_keys.dtype), mode="drop"),
            self.stored_values.at[rows, :, slots].set(values.astype(self.stored_values.dtype), mode="drop"),
            self.positions.at[rows, slots].set(positions, mode="drop"),
        )

    def extend(self, new: KeyValues, in_order: bool) -> tuple[tuple[KeyValues, ...], "LayerCache"]:
        """What the queries of new tokens may see, in one or two parts, and the cache with the new tokens written.

        A single token is written first and sees the slots. Several tokens see the old slots and themselves: writing
        them may overwrite slots that the first of them still see.

        Args:
          in_order: sort the old slots by position, oldest first. A mask does not need that; blocks of keys do.
        """
        written = self.write(*new)
        if new.keys.shape[1] == 1:
            return (written.view(),), written
        return (self.in_order() if in_order else self.view(), new), written

    def view(self) -> KeyValues:
        """All slots, in the order in which they are stored."""
        return KeyValues(self.keys, self.values, self.positions)

    def in_order(self) -> KeyValues:
        """All slots sorted by position: the empty ones, then the oldest to the latest."""
        order = jnp.argsort(self.positions, axis=1)
        rows = jnp.arange(order.shape[0])[:, None]
        return KeyValues(self.keys[rows, order], self.values[rows, order], self.positions[rows, order])

    def grown(self, slots: int) -> "LayerCache":
        """The same cache with more slots. Valid only while no slot has been overwritten."""
        more = slots - self.slots
        return LayerCache(
            jnp.pad(self.stored_keys, ((0, 0), (0, 0), (0, 0), (0, more))),
            jnp.pad(self.stored_values, ((0, 0), (0, 0), (0, more), (0, 0))),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
        )


LAYER_CACHE_NAMES: Any = LayerCache._make(
    [("batch", "kv_heads", None, None), ("batch", "kv_heads", None, None), ("batch", None)]
)
"""The logical axes of a layer's cache."""


def new_layer_cache(cfg: ModelConfig, batch_size: int, slots: int, num_kv_heads: int | None = None) -> LayerCache:
    """An empty cache of one attention layer; of fewer heads than the model has, for a part of them."""
    dtype, sizes = jnp.dtype(cfg.dtype), cfg.resolved
    heads = num_kv_heads or sizes.num_kv_heads
    return _constrained(
        LayerCache(
            jnp.zeros((batch_size, heads, sizes.head_dim, slots), dtype),
            jnp.zeros((batch_size, heads, slots, sizes.value_head_dim), dtype),
            jnp.full((batch_size, slots), -1, jnp.int32),
        )
    )


def _constrained(cache: LayerCache) -> LayerCache:
    return LayerCache(*(constrain(leaf, *names) for leaf, names in zip(cache, LAYER_CACHE_NAMES, strict=True)))


class KVCache(NamedTuple):
    """The state of cached decoding: the slots of every layer, and the position of each row's next token."""

    layers: tuple[LayerCache, ...]
    next_position: Int[Array, " B"]


class RecurrentCache(NamedTuple):
    """The hidden state [B, D] of each layer; for an LSTM the pair (cell state, hidden state)."""

    layers: tuple[Any, ...]


Cache: TypeAlias = KVCache | RecurrentCache | tuple[()]
"""The state of any family; bigrams have none."""


def init_cache(cfg: ModelConfig, batch_size: int, capacity: int) -> Cache:
    """An empty cache for `batch_size` rows.

    Args:
      capacity: slots of an attention layer without window, in tokens. Beyond it the oldest keys are overwritten, so the
        model becomes the one with window min(W, capacity) in every layer. Other families ignore it.

    Raises:
      UserError: batch_size or capacity below 1, or a capacity beyond a learned position table.
    """
    check_cache_size(cfg, batch_size, capacity)
    if cfg.family == "recurrent":
        return zero_state(cfg, batch_size)
    if cfg.family != "transformer":
        return ()
    layers = tuple(new_layer_cache(cfg, batch_size, slots) for slots in layer_slots(cfg, capacity))
    return KVCache(layers=layers, next_position=jnp.zeros(batch_size, jnp.int32))


def checked_past(cfg: ModelConfig, batch_size: int, given: Any, kind: type) -> Any:
    """What a model was given as its cache: None, a cache of this kind, or a capacity as an int.

    Raises:
      UserError: anything else; a capacity that `init_cache` refuses.
    """
    if given is None or type(given) is kind:
        return given
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise UserError(
            f"cache = {given!r:.80} is no cache of a {cfg.family} model: give what the call before returned, None, or "
            "a capacity as an int that is known when JAX compiles"
        )
    check_cache_size(cfg, batch_size, int(given))
    return int(given)


def check_cache_size(cfg: ModelConfig, batch_size: int, capacity: int) -> None:
    """Raises what `init_cache` raises."""
    if batch_size < 1 or capacity < 1:
        raise UserError(f"batch_size = {batch_size} and capacity = {capacity}: give at least 1 of each")
    cfg.check_reach(capacity, "give a smaller capacity")


def constrain_cache(cache: Cache) -> Cache:
    """The same cache, its rows and key/value heads split over the mesh in context."""
    if not isinstance(cache, KVCache):
        return cache
    return cache._replace(layers=tuple(map(_constrained, cache.layers)))


def grow_cache(cfg: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """The same cache with a larger capacity. Exact while no row has more tokens than the old capacity."""
    if not isinstance(cache, KVCache):
        return cache
    layers = zip(cache.layers, layer_slots(cfg, capacity), strict=True)
    return cache._replace(layers=tuple(layer.grown(slots) for layer, slots in layers))


def zero_state(cfg: ModelConfig, batch_size: int) -> RecurrentCache:
    """The hidden states of a recurrent model before its first token."""
    state = jnp.zeros((batch_size, cfg.embed_dim), jnp.dtype(cfg.dtype))
    return RecurrentCache(((state, state) if cfg.cell == "lstm" else state,) * cfg.num_layers)


def layer_slots(cfg: ModelConfig, capacity: int) -> tuple[int, ...]:
    """The slots of each attention layer in a cache of this capacity: min(W, capacity)."""
    return tuple(capacity if window is None else min(capacity, window) for window in cfg.layer_windows)
