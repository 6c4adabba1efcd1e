"""Fresh parameters of torchref against those of `jaxlm.init_params`, and the effect of its dropout rates."""

import collections
import math

import jax
import numpy as np
import pytest
import torch

import jaxlm
import torchref
from jaxlm.config import ModelConfig
from jaxlm.convert import to_torchref
from jaxlm.convert.tensors import to_array

SIZES = {"vocab_size": 61, "max_seq_len": 59, "num_layers": 2, "embed_dim": 64}
TRANSFORMER = SIZES | {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 18,
    "mlp_dim": 67,
    "activation": "swiglu",
    "head_bias": True,
    "tie_embeddings": False,
    "qk_norm": True,
}
CONFIGS = {
    "gpt2": ModelConfig(**TRANSFORMER, init="gpt2", attention_score="multiplicative"),
    "normal": ModelConfig(**TRANSFORMER, init="normal", attention_score="additive", score_dim=29),
    "torch": ModelConfig(**TRANSFORMER, init="torch", attention_score="multiplicative"),
    "torch, concat": ModelConfig(**TRANSFORMER, init="torch", attention_score="concat"),
    "torch, additive": ModelConfig(**TRANSFORMER, init="torch", attention_score="additive", score_dim=29),
    "torch, tied": ModelConfig(
        vocab_size=61, max_seq_len=3, embed_dim=64, head_bias=True, init="torch", family="embedding_bigram"
    ),
    "torch, bigram": ModelConfig(vocab_size=61, max_seq_len=3, init="torch", family="bigram"),
    "elman": ModelConfig(**SIZES, init="torch", family="recurrent", cell="elman"),
    "lstm": ModelConfig(**SIZES, init="torch", family="recurrent", cell="lstm"),
    "gru": ModelConfig(**SIZES, init="gpt2", family="recurrent", cell="gru"),
}


def by_kind(state):
    """The values of each kind of parameter: its name without the number of the layer."""
    found = collections.defaultdict(list)
    for name, tensor in state.items():
        found[".".join(part for part in name.split(".") if not part.isdigit())].append(tensor.flatten())
    return {kind: to_array(torch.cat(values).double()) for kind, values in found.items()}


SLOW = ("torch", "torch, concat")
"""What they draw the others draw too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CONFIGS]
)
def test_parameters_begin_as_those_of_jaxlm(name):
    cfg = CONFIGS[name]
    torch.manual_seed(0)
    ours = by_kind(torchref.build_model(cfg).state_dict())
    theirs = by_kind(to_torchref(cfg, jaxlm.init_params(jaxlm.build_model(cfg), jax.random.key(0))))
    assert ours.keys() == theirs.keys()
    for kind, values in ours.items():
        reference = theirs[kind]
        if np.ptp(reference) == 0:
            assert (values == reference).all(), kind
            continue
        error = 5 / math.sqrt(len(values))  # 5 standard errors of a ratio of two normal ones
        assert abs(values.std() / reference.std() - 1) < error, kind
        assert abs(values.mean() - reference.mean()) < 2 * error * reference.std(), kind
        # the tails tell U(-a, a), whose fourth moment is 1.8 variances squared, from a normal distribution (3)
        kurtosis, expected = ((x**4).mean() / (x**2).mean() ** 2 for x in (values, reference))
        if len(values) > 1000:
            assert abs(kurtosis - expected) < 0.5, kind
        if expected < 2.3:
            bound = np.abs(reference).max()
            assert abs(np.abs(values).max() / bound - 1) < 10 / len(values), kind


RATE = 0.25


def constant(cfg, head):
    """A model whose embedding is all ones, whose head is the given matrix and whose other parameters are zero."""
    model = torchref.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embedding.weight.fill_(1)
        model.head.weight.copy_(head)
    return model


def assert_dropped(values, independent=None):
    """Each value is 0 or 1 / (1 - rate), as often as it should be within 5 standard errors."""
    assert torch.allclose(values * (values - 1 / (1 - RATE)), torch.zeros(()), atol=1e-5)
    error = math.sqrt(RATE * (1 - RATE) / (independent or values.numel()))
    assert abs((values == 0).double().mean() - RATE) < 5 * error


def test_dropout_follows_the_embedding_and_each_sublayer():
    torch.manual_seed(0)
    shared = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "norm": "none", "position": "none"}
    cfg = ModelConfig(vocab_size=16, max_seq_len=32, tie_embeddings=False, dropout=RATE, **shared)
    model, tokens = constant(cfg, torch.eye(16)), torch.zeros(64, 32, dtype=torch.long)
    block = model.blocks[0]
    with torch.no_grad():
        block.attention.out.bias.fill_(16)  # binary places apart: the sum shows what each dropped
        block.mlp.down.bias.fill_(256)
        assert model.eval()(tokens).unique().tolist() == [273]
        logits = model.train()(tokens) * (1 - RATE)
    logits = logits.round().long()
    parts = [(logits >> shift & 1) / (1 - RATE) for shift in (0, 4, 8)]
    for part in parts:
        assert_dropped(part)
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        both = ((parts[one] == 0) & (parts[other] == 0)).double().mean()
        assert abs(both - RATE**2) < 5 * math.sqrt(RATE**2 / logits.numel())


def test_attention_dropout_takes_out_weights():
    torch.manual_seed(0)
    shared = {"num_layers": 1, "embed_dim": 4, "num_heads": 4, "norm": "none", "position": "none", "mlp_dim": 0}
    options = {"tie_embeddings": False, "residual": False, "attention_dropout": RATE}
    cfg = ModelConfig(vocab_size=4, max_seq_len=2, **shared, **options)
    model, tokens = constant(cfg, torch.eye(4)), torch.zeros(4000, 2, dtype=torch.long)
    with torch.no_grad():
        model.blocks[0].attention.value.bias.fill_(1)
        model.blocks[0].attention.out.weight.copy_(torch.eye(4))
        assert model.eval()(tokens).unique().tolist() == [1]
        logits = model.train()(tokens)
    assert_dropped(logits[:, 0])
    pairs = (2 * (1 - RATE) * logits[:, 1]).round().long()  # of two weights of 1/2, how many stay
    share = torch.bincount(pairs.flatten()) / pairs.numel()
    for found, expected in zip(share.tolist(), [RATE**2, 2 * RATE * (1 - RATE), (1 - RATE) ** 2], strict=True):
        assert found == pytest.approx(expected, abs=5 * math.sqrt(0.25 / pairs.numel()))


def test_dropout_follows_each_recurrent_layer():
    torch.manual_seed(0)
    cfg = ModelConfig(
        vocab_size=16, max_seq_len=32, family="recurrent", num_layers=2, embed_dim=16, cell_activation="relu",
        tie_embeddings=False, dropout=RATE,
    )  # fmt: skip
    model, tokens = constant(cfg, torch.eye(16)), torch.zeros(64, 32, dtype=torch.long)
    first, second = (block.cell["i"] for block in model.blocks)
    with torch.no_grad():
        first.bias.fill_(1)
        second.bias.fill_(1)
        assert model.eval()(tokens).unique().tolist() == [1]
        model.train()
        assert_dropped(model(tokens))
        second.bias.zero_()
        second.weight.copy_(torch.eye(16))
        twice = model(tokens)
        assert abs((twice == 0).double().mean() - (1 - (1 - RATE) ** 2)) < 5 * math.sqrt(0.25 / twice.numel())
        first.bias.zero_()
        first.weight.copy_(torch.eye(16))
        thrice = model(tokens)
    assert abs((thrice == 0).double().mean() - (1 - (1 - RATE) ** 3)) < 5 * math.sqrt(0.25 / thrice.numel())


@pytest.mark.parametrize("family", ["embedding_bigram", "recurrent", "transformer"])
def test_embedding_dropout_takes_out_whole_words(family):
    torch.manual_seed(0)
    layers = {"embedding_bigram": {}, "recurrent": {"num_layers": 1, "cell_activation": "relu"}}
    layers["transformer"] = {"num_layers": 1, "num_heads": 1, "position": "none", "norm": "none"}
    cfg = ModelConfig(
        vocab_size=5000, max_seq_len=2, family=family, embed_dim=2, tie_embeddings=False,
        embedding_dropout=RATE, **layers[family],
    )  # fmt: skip
    head = torch.zeros(5000, 2)
    head[:2] = torch.eye(2)
    model, tokens = constant(cfg, head), torch.arange(5000).reshape(2, 2500).T.repeat(2, 1)
    with torch.no_grad():
        if family == "recurrent":
            model.blocks[0].cell["i"].weight.copy_(torch.eye(2))
        assert model.eval()(tokens)[..., :2].unique().tolist() == [1]
        features = model.train()(tokens)[..., :2]
    assert_dropped(features, independent=5000)
    assert features[..., 0].equal(features[..., 1])
    assert features[:2500].equal(features[2500:])
