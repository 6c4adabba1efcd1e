"""Cached decoding against the full forward pass, in float64, where equal means equal."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import BASE, VARIANTS
from support import apply, built, random_tokens
from tolerances import FLOAT64, assert_close

from jaxlm.model.build import build_model
from jaxlm.model.cache import KVCache
from jaxlm.model.layer_stack import unstack_params

pytestmark = pytest.mark.x64

SPLITS = [(4, 4, 1), (9,), (1,) * 9, (1, 7, 1)]
ALL_SPLITS = [tuple(len(piece) + 1 for piece in "".join(cuts).split("|")) for cuts in itertools.product(".|", repeat=8)]
"""All 256 ways to cut nine tokens."""


def wide(cfg):
    return dataclasses.replace(cfg, dtype="float64", param_dtype="float64", max_seq_len=9)


def cached_logits(cfg, tokens, split, capacity):
    """From the capacity, or from an empty cache where the first piece is a single token."""
    model, params = built(cfg)
    cache, pieces, start = capacity if split[0] > 1 else model.init_cache(tokens.shape[0], capacity), [], 0
    for size in split:
        logits, cache = apply(model, params, tokens[:, start : start + size], cache)
        pieces.append(logits)
        start += size
    if isinstance(cache, KVCache):
        assert cache.next_position.tolist() == [start] * tokens.shape[0]
    return jnp.concatenate(pieces, axis=1)


@functools.cache
def full_logits(name):
    """(config, tokens, logits of the full pass) of a variant."""
    cfg = wide(VARIANTS[name])
    tokens = random_tokens(cfg, 3, 9)
    return cfg, tokens, apply(*built(cfg), tokens)[0]


UNCACHED = (
    *("rmsnorm", "no_norm", "post_norm", "no_residual", "no_bias", "qkv_bias", "head_bias_untied", "no_out_proj"),
    *("no_mlp", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "final_softcap", "bigram_capped", "elman_relu"),
    *("attention_softcap", "elman_slide", "narrow_heads", "multi_head", "multiplicative", "remat"),
    *("summed_multiplicative", "summed_additive"),
)
"""Variants of what no cache holds, or whose cache is that of another one here."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in UNCACHED else ()) for name in VARIANTS]
)
def test_cached_logits_are_those_of_the_full_pass_however_the_prompt_is_cut(name):
    cfg, tokens, full = full_logits(name)
    assert full.dtype == jnp.float64
    for split in SPLITS if name in ("window_pattern", "local", "lstm") else SPLITS[:1]:
        assert_close(cached_logits(cfg, tokens, split, 9), full, FLOAT64)


@pytest.mark.parametrize("name", [pytest.param("window_pattern", marks=pytest.mark.slow), "learned"])
def test_every_way_to_cut_a_prompt_gives_the_logits_of_the_full_pass(name):
    cfg, tokens, full = full_logits(name)
    assert len(set(ALL_SPLITS)) == 256
    for split in ALL_SPLITS:
        assert_close(cached_logits(cfg, tokens, split, 9), full, FLOAT64)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_function_written_out(name):
    cfg, tokens, full = full_logits(name)
    params = built(cfg)[1]
    params = jax.tree.map(np.asarray, unstack_params(cfg, params) if cfg.scan_layers else params)
    assert_close(full, [naive.logits(cfg, params, np.asarray(row)) for row in tokens], FLOAT64)


@pytest.mark.slow
def test_every_variant_is_another_function():
    seen = []
    for name in VARIANTS:
        logits = np.asarray(full_logits(name)[2])
        assert not any(np.allclose(logits, other, atol=1e-4) for other in seen), name
        seen.append(logits)


@pytest.mark.parametrize("window", [1, 3, (3, 1), *(pytest.param(window, marks=pytest.mark.slow) for window in (2, 4))])
def test_windows_hold_three_windows_past_the_wrap_of_the_ring(window):
    cfg = dataclasses.replace(wide(BASE), window=window)
    model, params = built(cfg)
    tokens = random_tokens(cfg, 2, 17)
    full, _ = apply(model, params, tokens)
    widest = window if isinstance(window, int) else max(window)
    around = [(first, *(1,) * (17 - first)) for first in (widest - 1, widest, widest + 1) if first]
    for split in ((17,), (2, 14, 1), *around):
        assert_close(cached_logits(cfg, tokens, split, 17), full, FLOAT64)


def test_capacity_does_not_change_the_result_until_it_is_full_and_then_is_a_window():
    cfg = wide(BASE)
    tokens = random_tokens(cfg, 2, 9)
    for capacity in (9, 10, 23):
        assert_close(cached_logits(cfg, tokens, (4, 4, 1), capacity), cached_logits(cfg, tokens, (9,), 9), FLOAT64)
    windowed, params = built(dataclasses.replace(cfg, window=4))
    full, _ = apply(windowed, params, tokens)
    for split in ((9,), (1,) * 9, (4, 4, 1)):
        assert_close(cached_logits(cfg, tokens, split, 4), full, FLOAT64)


@pytest.mark.parametrize(
    "name", ["window_pattern", "local", "learned", "summed_scores", "lstm", "gru_scanned", "bigram"]
)
def test_a_ragged_batch_gives_what_each_row_gives_alone(name):
    cfg = wide(VARIANTS[name])
    model, params = built(cfg)
    tokens, following = random_tokens(cfg, 3, 6), random_tokens(cfg, 3, 1, seed=1)
    lengths = [6, 1, 4]
    cache = model.init_cache(3, 9)
    logits, cache = apply(model, params, tokens, cache=cache, lengths=jnp.array(lengths))
    next_logits, cache = apply(model, params, following, cache=cache)
    if isinstance(cache, KVCache):
        assert cache.next_position.tolist() == [7, 2, 5]
    for row, length in enumerate(lengths):
        alone = jnp.concatenate([tokens[row : row + 1, :length], following[row : row + 1]], axis=1)
        full, _ = apply(model, params, alone)
        assert_close(logits[row, :length], full[0, :length], FLOAT64)
        assert_close(next_logits[row, 0], full[0, -1], FLOAT64)


@pytest.mark.parametrize("capacity", [3, 9])
@pytest.mark.parametrize(
    "name", ["learned", "window_pattern", "scan_layers", "remat", "gru_scanned", "embedding_bigram"]
)
def test_a_capacity_gives_what_an_empty_cache_gives(name, capacity):
    cfg = wide(VARIANTS[name])
    model, params = built(cfg)
    tokens, lengths = random_tokens(cfg, 3, 7), jnp.array([7, 0, 4])
    logits, cache = apply(model, params, tokens, capacity, lengths)
    expected, filled = apply(model, params, tokens, model.init_cache(3, capacity), lengths)
    jax.tree.map(lambda a, b: assert_close(a, b, FLOAT64), cache, filled)
    assert jax.tree.structure(cache) == jax.tree.structure(filled)
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], expected[row, :length], FLOAT64)


@pytest.mark.parametrize("capacity", [0, 10])
def test_a_capacity_is_refused_as_for_an_empty_cache(capacity):
    model, params = built(wide(VARIANTS["learned"]))
    with pytest.raises(ValueError, match=f"capacity = {capacity}|{capacity} tokens are beyond"):
        model.apply({"params": params}, random_tokens(model.cfg, 1, 2), capacity)


@pytest.mark.parametrize(
    ("window", "prompt"),
    [
        ((1, 5), (9, 1, 13)),
        pytest.param((16, 3), (2, 21), marks=pytest.mark.slow),
        (5, (4, 4, 4, 4, 4, 3)),
        (5, (2,) * 11),
        pytest.param(17, (16, 7), marks=pytest.mark.slow),
    ],
)
def test_a_local_prefill_sees_the_ring_and_itself(window, prompt):
    cfg = dataclasses.replace(wide(BASE), window=window)
    model, params = built(cfg)
    tokens = random_tokens(cfg, 2, 23)
    full, _ = apply(model, params, tokens)
    local = dataclasses.replace(cfg, attention_impl="local")
    cache, start = model.init_cache(2, 23), 0
    for size in prompt:
        logits, cache = apply(build_model(local), params, tokens[:, start : start + size], cache)
        assert_close(logits, full[:, start : start + size], FLOAT64)
        start += size
