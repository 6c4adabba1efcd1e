"""torchref's stateful cache against the full forward pass, in float64."""

import dataclasses
import itertools

import pytest
import torch
from tolerances import assert_close

import torchref
from jaxlm.config import ModelConfig
from torchref.attention import SelfAttention

EXACT = 1e-12
"""The same sums in another order."""
LENGTH = 6
BASE = ModelConfig(
    vocab_size=11,
    max_seq_len=LENGTH,
    num_layers=2,
    embed_dim=12,
    num_heads=3,
    mlp_dim=13,
    init="torch",
    dtype="float64",
    param_dtype="float64",
)
SMALL = {field: getattr(BASE, field) for field in ("vocab_size", "max_seq_len", "init", "dtype", "param_dtype")}


def config(**changes):
    return dataclasses.replace(BASE, **changes)


GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "position": "rope"}
CONFIGS = {
    "learned": BASE,
    "learned, window 1": config(window=1),
    "learned, windows 2 and all": config(window=(2, None), norm_order="post"),
    "sinusoidal, window 3": config(position="sinusoidal", window=3),
    "rope, windows 3 and 4": config(position="rope", window=(3, 4), num_kv_heads=1, qk_norm=True, norm="rmsnorm"),
    "interleaved, window 4": config(position="rope", rope_layout="interleaved", window=4, activation="swiglu"),
    "none, window 3": config(position="none", window=3, attention_softcap=2.0, final_softcap=3.0),
    "mean_pooled": config(**GROUPED, kv_sharing="mean_pooled", window=3, attention_score="multiplicative"),
    "summed_scores": config(**GROUPED, kv_sharing="summed_scores", window=3, attention_score="additive"),
    "concat": config(**GROUPED, attention_score="concat", window=3, value_head_dim=5),
    "bigram": ModelConfig(family="bigram", **SMALL),
    "embedding_bigram": ModelConfig(family="embedding_bigram", embed_dim=5, **SMALL),
    "elman": ModelConfig(family="recurrent", cell="elman", embed_dim=5, num_layers=2, **SMALL),
    "lstm": ModelConfig(family="recurrent", cell="lstm", embed_dim=5, num_layers=2, **SMALL),
    "gru": ModelConfig(family="recurrent", cell="gru", embed_dim=5, num_layers=2, **SMALL),
}


def built(cfg, seed=0):
    torch.manual_seed(seed)
    return torchref.build_model(cfg).eval()


def random_tokens(length, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_chunks(model, tokens, lengths):
    """Logits of the sequence, read through the cache in chunks of these lengths."""
    model.clear_cache()
    return torch.cat([model(chunk, use_kv_cache=True) for chunk in tokens.split(lengths, dim=1)], dim=1)


def every_split(length):
    for count in range(length):
        for cuts in itertools.combinations(range(1, length), count):
            ends = (0, *cuts, length)
            yield [end - start for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_split_of_a_sequence_is_the_full_forward_pass(name):
    model, tokens = built(CONFIGS[name]), random_tokens(5)
    with torch.no_grad():
        full = model(tokens)
    splits = list(every_split(5))
    assert len(splits) == 16
    for lengths in splits:
        assert_close(in_chunks(model, tokens, lengths), full, EXACT)


@pytest.mark.parametrize("position", ["rope", "sinusoidal", "none"])
@pytest.mark.parametrize("window", [None, (3, None), (4, 9), 5])
def test_beyond_max_seq_len_every_window_is_at_most_that(position, window):
    capacity, length = 4, 11
    rolling = built(config(position=position, window=window, max_seq_len=capacity))
    windows = [capacity if w is None else min(w, capacity) for w in rolling.cfg.window_period]
    windowed = torchref.build_model(config(position=position, window=tuple(windows), max_seq_len=length)).eval()
    windowed.load_state_dict(rolling.state_dict(), strict=True)
    tokens = random_tokens(length)
    with torch.no_grad():
        full, unlimited = windowed(tokens), rolling(tokens)
    changed = (unlimited - full).abs().amax(dim=(0, 2)) > 1e-3
    assert not changed[:capacity].any()
    assert changed[capacity:].all() == any(w is None or w > capacity for w in rolling.cfg.window_period)
    for lengths in ([1] * 11, [11], [3, 8], [4, 1, 6], [5, 5, 1], [2, 4, 1, 4], [7, 1, 1, 2]):
        assert_close(in_chunks(rolling, tokens, lengths), full, EXACT)


def test_a_learned_table_ends_and_what_was_read_stays():
    model, tokens = built(BASE), random_tokens(LENGTH + 1)
    with torch.no_grad():
        full = model(tokens[:, :LENGTH])
        with pytest.raises(ValueError, match="7 tokens are beyond the learned position table, max_seq_len = 6"):
            model(tokens)
        model(tokens[:, :5], use_kv_cache=True)
        with pytest.raises(ValueError, match="7 tokens are beyond the learned position table, max_seq_len = 6"):
            model(tokens[:, 5:], use_kv_cache=True)
        assert_close(model(tokens[:, 5:LENGTH], use_kv_cache=True), full[:, 5:], EXACT)


@pytest.mark.parametrize("name", ["learned", "rope, windows 3 and 4", "lstm", "gru"])
def test_a_cleared_cache_forgets_and_calls_without_it_leave_it(name):
    model, tokens = built(CONFIGS[name]), random_tokens(LENGTH)
    with torch.no_grad():
        first = model(tokens[:, :3], use_kv_cache=True)
        full = model(tokens)
        rest = model(tokens[:, 3:], use_kv_cache=True)
        assert_close(rest, full[:, 3:], EXACT)
        assert (model(tokens[:, :3], use_kv_cache=False) - first).abs().max() == 0
        model.clear_cache()
        assert (model(tokens[:, :3], use_kv_cache=True) - first).abs().max() == 0
        model.clear_cache()
        assert (model(tokens[:, 3:], use_kv_cache=True) - rest).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [[1] * 9, [9], [3, 6], [6, 3]])
@pytest.mark.parametrize("window", [None, 2])
def test_at_most_max_seq_len_keys_are_kept(lengths, window):
    cfg = config(position="rope", window=window, max_seq_len=4, num_kv_heads=1, value_head_dim=5)
    model = built(cfg)
    in_chunks(model, random_tokens(9), lengths)
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    assert len(layers) == 2
    for layer in layers:
        keys, values, positions = layer.cache
        assert keys.shape == (2, 1, 4, 4)
        assert values.shape == (2, 1, 4, 5)
        assert positions.tolist() == [5, 6, 7, 8]
    model.clear_cache()
    assert all(layer.cache is None for layer in layers)


def test_the_cache_carries_gradients():
    model, tokens = built(CONFIGS["rope, windows 3 and 4"]), random_tokens(LENGTH)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens)[:, -1].square().sum(), parameters)
    model(tokens[:, :4], use_kv_cache=True)
    found = torch.autograd.grad(model(tokens[:, 4:], use_kv_cache=True)[:, -1].square().sum(), parameters)
    for ours, reference in zip(found, expected, strict=True):
        assert_close(ours, reference, EXACT)
