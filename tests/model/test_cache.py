"""The slots of the key/value cache."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import VARIANTS
from support import built, random_tokens

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


@pytest.mark.parametrize("wrong", [True, 8.0, "8", jnp.int32(8), [1], 0, -3])
@pytest.mark.parametrize("name", ["rope", "lstm", "bigram", "embedding_bigram"])
def test_what_is_neither_a_cache_nor_a_capacity_is_refused(name, wrong):
    model, params = built(VARIANTS[name])
    with pytest.raises(ValueError, match="is no cache of a|give at least 1 of each"):
        model.apply({"params": params}, random_tokens(model.cfg, 1, 2), wrong)


def test_a_capacity_may_be_any_whole_number_of_python_or_numpy():
    model, params = built(VARIANTS["rope"])
    tokens = random_tokens(model.cfg, 1, 2)
    caches = [model.apply({"params": params}, tokens, capacity)[1] for capacity in (5, np.int64(5))]
    assert [cache.layers[0].slots for cache in caches] == [5, 5]
