"""torchref's layers in float64 against torch's functions, or against plain loops if no library has them."""

import math
from types import SimpleNamespace

import huggingface
import numpy as np
import pytest
import torch
from tolerances import FLOAT64, assert_close
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from torchref import cross_entropy
from torchref.attention import SelfAttention
from torchref.layers import ACTIVATIONS, MLP, Norm, frequencies, rotate, sinusoids, softcap

TYPES = {"dtype": "float64", "param_dtype": "float64"}


def config(**changes):
    # a bias of the keys has no gradient but rounding: the softmax cancels it (whole models have them)
    return ModelConfig(vocab_size=7, max_seq_len=9, init="torch", qkv_bias=False, **TYPES, **changes)


def normal(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def assert_same_value_and_gradients(ours, theirs, *tensors):
    """Compares f(*tensors) and the gradients in the tensors of sum(f * w), w random."""
    found = []
    for function in (ours, theirs):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        value = function(*inputs)
        weight = normal(*value.shape, seed=1)
        found.append([value.detach(), *torch.autograd.grad((value * weight).sum(), inputs)])
    for mine, their in zip(*found, strict=True):
        assert_close(mine, their, FLOAT64)


def assert_same_module(module, theirs, *tensors):
    """The same for a module and a function of (the module's parameters by name, the tensors)."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def split(tensors):
        return dict(zip(names, tensors, strict=False)), tensors[len(names) :]

    def ours(*tensors):
        parameters, inputs = split(tensors)
        return torch.func.functional_call(module, parameters, inputs)

    def expected(*tensors):
        parameters, inputs = split(tensors)
        return theirs(parameters, *inputs)

    assert_same_value_and_gradients(ours, expected, *parameters, *tensors)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
        ("relu", functional.relu),
        ("silu", functional.silu),
    ],
)
def test_activations_are_torchs(name, theirs):
    assert_same_value_and_gradients(ACTIVATIONS[name], theirs, normal(5, 7, scale=3))


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("swiglu", functional.silu),
        ("geglu", functional.gelu),
        ("geglu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
def test_gated_mlps_multiply_what_the_gate_lets_through(name, gate):
    def theirs(p, x):
        hidden = gate(functional.linear(x, p["gate.weight"], p["gate.bias"]))
        hidden = hidden * functional.linear(x, p["up.weight"], p["up.bias"])
        return functional.linear(hidden, p["down.weight"], p["down.bias"])

    mlp = MLP(config(embed_dim=5, num_heads=1, mlp_dim=11, activation=name))
    assert_same_module(mlp, theirs, normal(2, 3, 5, scale=3))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_are_torchs(kind, bias):
    def theirs(p, x):
        if kind == "layernorm":
            return functional.layer_norm(x, (7,), p["weight"], p.get("bias"), eps=1e-2)
        return functional.rms_norm(x, (7,), p["weight"], eps=1e-2)

    norm = Norm(config(norm_eps=1e-2, use_bias=bias), 7, kind)
    assert (norm.bias is not None) == (bias and kind == "layernorm")
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(normal(7))
    assert_same_module(norm, theirs, normal(2, 3, 7))


def test_cross_entropy_is_torchs():
    logits, targets = normal(3, 5, 7, scale=3), torch.arange(15).reshape(3, 5) % 7
    kept = (torch.arange(15).reshape(3, 5) % 4 > 0).long()
    weights = normal(3, 5, seed=2).abs()

    def each(x):
        return functional.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none").reshape(3, 5)

    def ignoring(x):
        return functional.cross_entropy(x.flatten(0, 1), torch.where(kept == 1, targets, -100).flatten())

    assert_same_value_and_gradients(lambda x: cross_entropy(x, targets), lambda x: each(x).mean(), logits)
    assert_same_value_and_gradients(lambda x: cross_entropy(x, targets, kept), ignoring, logits)
    assert_same_value_and_gradients(
        lambda x: cross_entropy(x, targets, weights), lambda x: (each(x) * weights).sum() / weights.sum(), logits
    )


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_positions_are_a_complex_product(layout):
    positions, pairs = torch.tensor([0, 1, 5, 900]), 3
    angles = torch.outer(positions.double(), 500.0 ** -(torch.arange(pairs).double() / pairs))
    turn = torch.polar(torch.ones_like(angles), angles)

    def theirs(x):
        apart = x.unflatten(-1, (pairs, 2) if layout == "interleaved" else (2, pairs))
        apart = apart if layout == "interleaved" else apart.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(apart.contiguous()) * turn)
        return (turned if layout == "interleaved" else turned.transpose(-1, -2)).flatten(-2)

    assert_same_value_and_gradients(
        lambda x: rotate(x, positions, frequencies(6, 500.0), layout), theirs, normal(2, 3, 4, 6)
    )


def test_sinusoids_are_those_of_the_paper():
    positions = np.array([0, 1, 2, 77, 4096])
    expected = np.empty((5, 10))
    for pair in range(5):
        angle = positions / 10000 ** (2 * pair / 10)
        expected[:, 2 * pair], expected[:, 2 * pair + 1] = np.sin(angle), np.cos(angle)
    assert_close(sinusoids(torch.tensor(positions), 10, torch.float64), expected, FLOAT64)


def linear(p, name, x):
    return functional.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def causal_mask(length, window):
    behind = torch.arange(length)[:, None] - torch.arange(length)
    return (behind >= 0) & (behind < (window or length))


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_that_of_torch(kv_heads, window):
    cfg = config(embed_dim=18, num_heads=6, num_kv_heads=kv_heads, value_head_dim=5, position="none")

    def theirs(p, x):
        names = ("query", 6), ("key", kv_heads), ("value", kv_heads)
        q, k, v = (linear(p, name, x).unflatten(-1, (heads, -1)).transpose(1, 2) for name, heads in names)
        mask = {"is_causal": True} if window is None else {"attn_mask": causal_mask(7, window)}
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)
        return linear(p, "out", out.transpose(1, 2).flatten(2))

    attention = SelfAttention(cfg, LayerSettings(window, 1.0, 1.0))
    assert_same_module(_at(attention, 7), _renamed(theirs), normal(2, 7, 18))


def _at(attention, length):
    """The sublayer as a module of x alone, at positions 0 .. length - 1."""

    class OfX(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention

        def forward(self, x):
            return self.inner(x, torch.arange(length))

    return OfX()


def _renamed(function):
    return lambda p, x: function({name.removeprefix("inner."): value for name, value in p.items()}, x)


def test_scores_are_capped_as_in_gemma_2():
    cfg = config(embed_dim=12, num_heads=4, num_kv_heads=2, position="none", attention_softcap=0.5)
    blocked = torch.zeros(1, 1, 7, 7).double().masked_fill(~causal_mask(7, None), -math.inf)

    def theirs(p, x):
        heads = ("query", 4), ("key", 2), ("value", 2)
        q, k, v = (linear(p, name, x).unflatten(-1, (count, 3)).transpose(1, 2) for name, count in heads)
        module = SimpleNamespace(num_key_value_groups=2, training=False)
        with huggingface.in_float64():
            out, _ = eager_attention_forward(module, q, k, v, blocked, scaling=3**-0.5, softcap=0.5)
        return linear(p, "out", out.flatten(2))

    attention = SelfAttention(cfg, cfg.layer_settings[0])
    assert_same_module(_at(attention, 7), _renamed(theirs), normal(2, 7, 12, scale=3))
    assert softcap(normal(3), None).equal(normal(3))


def score(cfg, p, head, query, key):
    """The score of one key [H] for one query [H]."""
    if cfg.attention_score == "dot":
        return torch.dot(key, query) / math.sqrt(len(key))
    if cfg.attention_score == "multiplicative":
        return key @ p["score_weight"][head] @ query / math.sqrt(len(key))
    weight = torch.cat([p["score_key"][head], p["score_query"][head]])
    pair = torch.cat([key, query])
    if cfg.attention_score == "concat":
        return torch.dot(weight, pair)
    return torch.dot(p["score_out"][head], torch.tanh(weight.T @ pair))


def attention_in_loops(cfg, p, x, window):
    """The sublayer, computed for each sequence, query and attention map separately; x [B, T, D]."""
    group = cfg.num_heads // cfg.resolved.num_kv_heads
    rows = []
    for tokens in x:
        queries = linear(p, "query", tokens).unflatten(-1, (cfg.num_heads, cfg.resolved.head_dim))
        keys = linear(p, "key", tokens).unflatten(-1, (-1, cfg.resolved.head_dim))
        values = linear(p, "value", tokens).unflatten(-1, (-1, cfg.resolved.value_head_dim))
        if cfg.kv_sharing == "mean_pooled":
            shared = range(cfg.resolved.num_kv_heads)
            keys, values = (
                torch.stack([sum(a[:, i * group + j] for j in range(group)) / group for i in shared], 1)
                for a in (keys, values)
            )
        for t in range(len(tokens)):
            seen = range(0 if window is None else max(0, t + 1 - window), t + 1)
            maps = []
            for i in range(cfg.resolved.num_kv_heads):
                scores = [
                    torch.stack([score(cfg, p, n, queries[t, n], keys[s, i]) for s in seen])
                    for n in range(i * group, i * group + group)
                ]
                scores = [sum(scores)] if cfg.kv_sharing == "summed_scores" else scores
                for row in scores:
                    row = row if cfg.attention_softcap is None else softcap(row, cfg.attention_softcap)
                    maps.append(sum(w * values[s, i] for w, s in zip(row.softmax(0), seen, strict=True)))
            rows.append(torch.cat(maps))
    out = torch.stack(rows).unflatten(0, x.shape[:2])
    return linear(p, "out", out) if cfg.attention_out_proj else out


@pytest.mark.parametrize("score", ["dot", "multiplicative", "concat", "additive"])
@pytest.mark.parametrize("sharing", ["grouped", "mean_pooled", "summed_scores"])
def test_scores_and_shared_heads_are_their_formulas(sharing, score):
    options = {"kv_sharing": sharing, "attention_score": score, "score_dim": 5 if score == "additive" else None}
    # a cap keeps the query's term of concat scores from cancelling
    options |= {"attention_softcap": 1.5 if score == "concat" else None, "value_head_dim": 3}
    cfg = config(embed_dim=7, num_heads=4, num_kv_heads=2, head_dim=2, position="none", **options)
    torch.manual_seed(0)
    attention = SelfAttention(cfg, LayerSettings(3, 1.0, 1.0))

    def theirs(p, x):
        return attention_in_loops(cfg, p, x, 3)

    assert_same_module(_at(attention, 5), _renamed(theirs), normal(2, 5, 7, scale=2))


def test_without_a_projection_the_heads_are_joined_in_order():
    cfg = config(embed_dim=6, num_heads=3, position="none", attention_out_proj=False)
    attention = SelfAttention(cfg, cfg.layer_settings[0])
    assert_same_module(_at(attention, 5), _renamed(lambda p, x: attention_in_loops(cfg, p, x, None)), normal(2, 5, 6))
