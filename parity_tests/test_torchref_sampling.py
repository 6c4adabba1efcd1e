"""torchref's sampler: greedy against transformers' `generate`, filters against its warpers, cached against uncached."""

import dataclasses

import huggingface
import pytest
import torch
from tolerances import FLOAT64, assert_close
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import torchref
from jaxlm.config import ModelConfig
from torchref.sampling import filtered

TYPES = {"init": "torch", "dtype": "float64", "param_dtype": "float64"}
ROLLING = ModelConfig(
    vocab_size=11, max_seq_len=6, num_layers=2, embed_dim=12, num_heads=3, position="rope", window=(None, 3), **TYPES
)
LEARNED = dataclasses.replace(ROLLING, position="learned")
GRU = ModelConfig(vocab_size=11, max_seq_len=6, family="recurrent", cell="gru", num_layers=2, embed_dim=9, **TYPES)


def built(cfg, seed=0):
    torch.manual_seed(seed)
    return torchref.build_model(cfg)


def random_tokens(batch, length):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def sampled(model, prompt, count, seed=0, **options):
    return torchref.generate(model, prompt, count, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("family", "seed", "count"), [("GPT2", 1, 4), ("Llama", 0, 15), ("Llama", 2, 15)])
def test_greedy_tokens_are_those_of_transformers(family, seed, count, cached):
    theirs, ours = huggingface.drawn(family, seed)
    prompt = random_tokens(4, 3)
    with huggingface.in_float64():
        mask = torch.ones_like(prompt)
        expected = theirs.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=count)[:, 3:]
    found = torchref.generate(ours, prompt, count, temperature=0, use_kv_cache=cached)
    assert found.tolist() == expected.tolist()
    assert len(set(map(tuple, found.tolist()))) > 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 4}, {"temperature": 1.3, "top_p": 0.8}])
@pytest.mark.parametrize("cfg", [ROLLING, GRU], ids=["transformer", "gru"])
def test_cached_draws_are_the_naive_ones_also_past_max_seq_len(cfg, options):
    model, prompt = built(cfg), random_tokens(5, 4)
    naive = sampled(model, prompt, 17, **options)
    assert naive.shape == (5, 17)
    assert sampled(model, prompt, 17, use_kv_cache=True, **options).tolist() == naive.tolist()
    assert sampled(model, prompt, 17, seed=1, **options).tolist() != naive.tolist()


def test_a_learned_table_is_read_at_its_latest_tokens():
    model, prompt = built(LEARNED).eval(), random_tokens(5, 4)
    history = prompt
    for _ in range(9):
        with torch.no_grad():
            logits = model(history[:, -6:])[:, -1]
        history = torch.cat([history, logits.argmax(dim=-1, keepdim=True)], dim=1)
    found = torchref.generate(model, prompt, 9, temperature=0)
    assert found.tolist() == history[:, 4:].tolist()
    cached = torchref.generate(model, prompt, 3, temperature=0, use_kv_cache=True)
    assert cached.tolist() == history[:, 4:7].tolist()
    with pytest.raises(ValueError, match="7 tokens are beyond the learned position table, max_seq_len = 6"):
        torchref.generate(model, prompt, 4, temperature=0, use_kv_cache=True)


def test_filters_are_those_of_transformers():
    logits = 3 * torch.randn(50, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = set()
    for temperature, top_k, top_p in [
        (1.0, None, None),
        (0.5, 1, None),
        (2.0, 5, None),
        (1.0, 23, None),
        (1.0, 40, None),
        (1.0, None, 0.05),
        (1.5, None, 0.6),
        (1.0, None, 1.0),
        (0.8, 7, 0.9),
        (3.0, 7, 0.9),
    ]:
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        if top_k is not None:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p is not None:
            expected = TopPLogitsWarper(top_p)(None, expected)
        before = logits.clone()
        assert filtered(logits, temperature, top_k, top_p).tolist() == expected.tolist()
        assert logits.equal(before)
        kept |= set(expected.isfinite().sum(dim=-1).tolist())
    assert kept > {1, 2, 3, 4, 5, 7, 23}
    greedy = filtered(logits, 0, top_k=3, top_p=0.5).softmax(dim=-1)
    assert greedy.equal(torch.nn.functional.one_hot(logits.argmax(dim=-1), 23).double())


def test_draws_follow_the_filtered_probabilities():
    model = built(ModelConfig(vocab_size=7, max_seq_len=2, family="bigram", **TYPES))
    count, options = 20000, {"temperature": 0.8, "top_k": 5, "top_p": 0.95}
    found = sampled(model, torch.full((count, 1), 3), 1, **options)
    expected = filtered(model.table.weight[3:4].detach(), **options).softmax(dim=-1)[0]
    assert 2 < (expected > 0).sum() < 6
    share = torch.bincount(found[:, 0], minlength=7) / count
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize("cached", [False, True])
def test_sampling_drops_nothing_and_puts_the_mode_back(cached):
    cfg = dataclasses.replace(LEARNED, dropout=0.5, attention_dropout=0.5, embedding_dropout=0.5)
    model, prompt = built(cfg), random_tokens(5, 3)
    expected = sampled(model.eval(), prompt, 3, use_kv_cache=cached)
    assert not any(module.training for module in model.modules())
    assert sampled(model.train(), prompt, 3, use_kv_cache=cached).tolist() == expected.tolist()
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="beyond the learned position table"):
        sampled(model, random_tokens(5, 6), 2, use_kv_cache=True)
    assert all(module.training for module in model.modules())
    assert model.seen == 0


def test_sampling_leaves_no_cache_behind_and_uses_none():
    model, prompt = built(ROLLING).eval(), random_tokens(2, 3)
    expected = sampled(model, prompt, 5, use_kv_cache=True)
    with torch.no_grad():
        fresh = model(prompt)
        model(prompt, use_kv_cache=True)
    for cached in (False, True):
        assert sampled(model, prompt, 5, use_kv_cache=cached).tolist() == expected.tolist()
        with torch.no_grad():
            assert_close(model(prompt, use_kv_cache=True), fresh, FLOAT64)
