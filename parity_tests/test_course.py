"""The calls of CMU 15-780's hand-out: layers with a mask and a cache, a language model, and samplers."""

import re

import jax.numpy as jnp
import pytest
import torch
from tolerances import FLOAT32, assert_close
from torch.nn import functional

import jaxlm
from torchref.course import (
    LanguageModel,
    SelfAttention,
    TransformerBlockPreNorm,
    sample_transformer_cached,
    sample_transformer_naive,
)

LAYERS = {"attention": SelfAttention, "block": TransformerBlockPreNorm}
every = pytest.mark.parametrize("name", list(LAYERS))
EXACT = 1e-12
"""In float64: the same sums in another order."""
WIDE = {"dtype": "float64", "param_dtype": "float64"}


def causal(length):
    return torch.triu(torch.full((length, length), -torch.inf), diagonal=1)


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer(name, **options):
    torch.manual_seed(0)
    return LAYERS[name](64, 4, max_seq_len=32, **WIDE, **options)


def language_model(**options):
    torch.manual_seed(0)
    return LanguageModel(11, 24, 3, 2, max_seq_len=16, **options)


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def of_torch(attention, x, mask):
    """The same attention by torch's own function."""
    inner = attention.attention
    q, k, v = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (inner.query, inner.key, inner.value))
    return inner.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_attention_is_that_of_torch_with_and_without_a_mask():
    attention, X = layer("attention"), numbers(2, 7, 64)
    mask = causal(7).double()
    assert_close(attention(X, mask), of_torch(attention, X, mask), EXACT)
    assert_close(attention(X), of_torch(attention, X, None), EXACT)
    assert (attention(X) - attention(X, mask)).abs().max() > 1e-3


@torch.no_grad()
def test_a_block_is_attention_and_mlp_behind_their_norms():
    block, X, mask = layer("block", activation="relu", d_ff=96), numbers(2, 7, 64), causal(7)
    inner = block.block
    assert inner.mlp.up.weight.shape == (96, 64)
    attention = layer("attention")
    attention.attention.load_state_dict(inner.attention.state_dict())
    mid = X + attention(functional.layer_norm(X, [64], inner.attention_norm.weight, inner.attention_norm.bias), mask)
    norm = functional.layer_norm(mid, [64], inner.mlp_norm.weight, inner.mlp_norm.bias)
    assert_close(block(X, mask), mid + inner.mlp.down(torch.relu(inner.mlp.up(norm))), EXACT)


@every
@torch.no_grad()
def test_token_by_token_through_the_cache_is_the_whole(name):
    made, X = layer(name), numbers(2, 32, 64)
    whole = made(X, causal(32))
    for _ in range(2):
        tokens = [made(X[:, t : t + 1], use_kv_cache=True) for t in range(32)]
        assert_close(torch.cat(tokens, dim=1), whole, EXACT)
        made.clear_cache()
    chunks = [made(part, causal(part.shape[1]), use_kv_cache=True) for part in X.split([5, 1, 9, 17], dim=1)]
    assert_close(torch.cat(chunks, dim=1), whole, EXACT)


@every
@torch.no_grad()
def test_a_cleared_cache_forgets_and_other_calls_leave_it(name):
    made, X = layer(name), numbers(2, 6, 64)
    first = made(X[:, :2], use_kv_cache=True)
    made(X)
    second = made(X[:, 2:], use_kv_cache=True)
    made.clear_cache()
    assert made(X[:, :2], use_kv_cache=True).equal(first)
    made.clear_cache()
    assert (made(X[:, 2:], use_kv_cache=True) - second).abs().max() > 1e-3


@every
@torch.no_grad()
def test_more_tokens_than_max_seq_len_are_refused_and_nothing_is_lost(name):
    made, X = layer(name), numbers(1, 33, 64)
    message = r"33 tokens are more than max_seq_len = 32: give fewer, or clear_cache\(\)"
    with pytest.raises(ValueError, match=message):
        made(X)
    whole = made(X[:, :32], causal(32))
    made(X[:, :31], use_kv_cache=True)
    with pytest.raises(ValueError, match=message):
        made(X[:, 31:], use_kv_cache=True)
    assert_close(made(X[:, 31:32], use_kv_cache=True), whole[:, 31:], EXACT)


@torch.no_grad()
def test_without_max_seq_len_any_number_of_tokens_is_read():
    attention, X = SelfAttention(8, 2, **WIDE), numbers(1, 40, 8)
    tokens = [attention(X[:, t : t + 1], use_kv_cache=True) for t in range(40)]
    assert_close(torch.cat(tokens, dim=1), attention(X, causal(40)), EXACT)


@every
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (causal(3).isinf(), "mask is of bool: give numbers that are added to the scores, 0 and -inf"),
        (causal(32), r"mask is \[32, 32\] for 3 new tokens of 5: give \[3, 5\]"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(name, mask, message):
    made = layer(name)
    made(numbers(1, 2, 64), use_kv_cache=True)
    with pytest.raises(ValueError, match=message):
        made(numbers(1, 3, 64), mask, use_kv_cache=True)


@every
@pytest.mark.parametrize("shape", [[0, 3, 64], [2, 0, 64], [2, 3, 63], [3, 64]])
@pytest.mark.parametrize("use_kv_cache", [False, True])
@torch.no_grad()
def test_inputs_that_are_empty_or_of_another_width_are_refused_and_nothing_is_lost(name, shape, use_kv_cache):
    made, X = layer(name), numbers(2, 4, 64)
    whole = made(X, causal(4))
    made(X[:, :3], causal(3), use_kv_cache=True)
    with refused(f"X is {shape}: give [B, T, 64], at least one row and one token"):
        made(numbers(*shape), use_kv_cache=use_kv_cache)
    assert_close(made(X[:, 3:], use_kv_cache=True), whole[:, 3:], EXACT)


@pytest.mark.parametrize("shape", [[0, 3], [2, 0], [3]])
def test_a_model_refuses_no_tokens(shape):
    with refused(f"tokens are {shape}: give [B, T], at least one row and one token"):
        language_model()(torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("sample", [sample_transformer_cached, sample_transformer_naive])
@pytest.mark.parametrize("shape", [[0], [0, 3], [2, 0], [1, 2, 3]])
def test_a_sampler_refuses_no_prompt(sample, shape):
    with refused(f"prompt is {shape}: give [T] or [B, T], at least one row and one token"):
        sample(language_model(), torch.ones(shape, dtype=torch.int64), 2)


@torch.no_grad()
def test_the_logits_are_those_of_jaxlm():
    model, tokens = language_model(), torch.randint(11, (2, 16))
    params = jaxlm.convert.from_torchref(model.cfg, model.state_dict())
    logits, _ = jaxlm.build_model(model.cfg).apply({"params": params}, jnp.asarray(tokens.numpy()))
    whole = model(tokens)
    assert_close(whole, logits, FLOAT32)
    steps = [model(tokens[:, t : t + 1], use_kv_cache=True) for t in range(16)]
    assert_close(torch.cat(steps, dim=1), whole, FLOAT32)
    with pytest.raises(ValueError, match="17 tokens are beyond the learned position table, max_seq_len = 16"):
        model(tokens[:, :1], use_kv_cache=True)
    model.clear_cache()
    assert_close(model(tokens[:, :1], use_kv_cache=True), whole[:, :1], FLOAT32)


@pytest.mark.parametrize("prompt", [[3, 1, 4], torch.tensor([[3, 1, 4], [1, 5, 9]])], ids=["one", "two"])
@pytest.mark.parametrize("temperature", [0.6, 0])
def test_cached_sampling_draws_the_tokens_of_naive_sampling(prompt, temperature):
    model = language_model()
    lead = tuple(torch.as_tensor(prompt).shape[:-1])

    def drawn(sample, seed):
        return sample(model, prompt, 13, temperature, generator=torch.Generator().manual_seed(seed))

    naive = drawn(sample_transformer_naive, 0)
    assert naive.shape == (*lead, 13)
    assert drawn(sample_transformer_cached, 0).equal(naive)
    assert drawn(sample_transformer_naive, 1).equal(naive) == (temperature == 0)
    torch.manual_seed(5)
    naive = sample_transformer_naive(model, prompt, 13, temperature=temperature)
    torch.manual_seed(5)
    assert sample_transformer_cached(model, prompt, 13, temperature=temperature).equal(naive)


def test_beyond_max_seq_len_only_naive_sampling_goes_on():
    assert sample_transformer_naive(language_model(), [3, 1, 4], 20).shape == (20,)
    with pytest.raises(ValueError, match="17 tokens are beyond the learned position table, max_seq_len = 16"):
        sample_transformer_cached(language_model(), [3, 1, 4], 20)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.3), lambda p: torch.optim.Adam(p, lr=1e-2)], ids=["sgd", "adam"]
)
def test_a_text_is_learned(make):
    model = language_model()
    text = torch.arange(64).remainder(11).unfold(0, 17, 16)
    optimizer, losses = make(model.parameters()), []
    for _ in range(30):
        loss = functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] / 2
