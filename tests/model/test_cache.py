"""The slots of the key/value cache."""

import jax.numpy as jnp
import pytest

from jaxlm.config import ModelConfig
from jaxlm.model.cache import LayerCache, init_cache


def layer(slots, batch=2):
    keys, values = jnp.zeros((batch, 1, 1, slots)), jnp.zeros((batch, 1, slots, 1))
    return LayerCache(keys, values, jnp.full((batch, slots), -1, jnp.int32))


def write(cache, positions):
    positions = jnp.array(positions, jnp.int32)
    content = positions[..., None, None].astype(jnp.float32)
    return cache.write(content, 10 * content, positions)


def test_a_ring_keeps_the_latest_and_skips_padding():
    cache = write(layer(3), [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]])
    assert cache.positions.tolist() == [[3, 4, 2], [0, 1, -1]]
    assert cache.keys[..., 0, 0].tolist() == [[3, 4, 2], [0, 1, 0]]
    cache = write(cache, [[5], [2]])
    assert cache.positions.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert cache.values[..., 0, 0].tolist() == [[30, 40, 50], [0, 10, 20]]


def test_a_padded_row_leaves_its_slots_alone():
    cache = write(write(layer(3), [[0, 1, 2], [0, 1, 2]]), [[3], [-1]])
    assert cache.positions.tolist() == [[3, 1, 2], [0, 1, 2]]


def test_windowed_layers_keep_no_more_than_their_window():
    cfg = ModelConfig(vocab_size=5, max_seq_len=30, num_layers=3, embed_dim=6, num_heads=2, window=(4, None, 40))
    cache = init_cache(cfg, 7, 11)
    assert [entry.positions.shape for entry in cache.layers] == [(7, 4), (7, 11), (7, 11)]
    with pytest.raises(ValueError, match="31 tokens are beyond .* max_seq_len = 30: give a smaller capacity"):
        init_cache(cfg, 1, 31)
