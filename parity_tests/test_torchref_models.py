"""Whole networks of torchref against transformers and torch.nn: logits and the gradient of every parameter, float64."""

import huggingface
import pytest
import torch
from tolerances import FLOAT64, assert_close

import torchref
from jaxlm.config import ModelConfig

SEEDS = range(6)


def logits_with_gradients(model, tokens):
    """Returns the logits, and backpropagates their sum under random weights."""
    logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    return logits.detach()


def random_tokens(cfg, batch, length, seed=0):
    return torch.randint(cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", list(huggingface.FAMILIES))
def test_whole_models_are_those_of_transformers(family, seed):
    theirs, ours = huggingface.drawn(family, seed)
    cfg = ours.cfg
    tokens = random_tokens(cfg, 3, 7, seed)
    with huggingface.in_float64():
        expected = logits_with_gradients(theirs, tokens)
    assert expected.dtype == torch.float64
    assert_close(logits_with_gradients(ours, tokens), expected, FLOAT64)
    gradients = huggingface.in_torchref(theirs, lambda parameter: parameter.grad)
    named = dict(ours.named_parameters(remove_duplicate=False))
    assert named.keys() == gradients.keys()
    for name, parameter in named.items():
        if name.endswith("attention.key.bias") and cfg.position == "learned":
            # the softmax cancels it: nothing but rounding on both sides
            scale = named[name.replace("key", "query")].grad.abs().max()
            assert max(parameter.grad.abs().max(), gradients[name].abs().max()) < 1e-12 * scale
        else:
            assert_close(parameter.grad, gradients[name], FLOAT64)


def test_the_drawn_models_meet_every_choice():
    def choices(family, *fields):
        configs = [huggingface.drawn(family, seed)[1].cfg for seed in SEEDS]
        return [{getattr(cfg, field) for cfg in configs} for field in fields]

    both = {False, True}
    assert choices("GPT2", "tie_embeddings") == [both]
    assert choices("Llama", "tie_embeddings", "use_bias") == [both, both]
    assert choices("Qwen3", "tie_embeddings", "qk_norm") == [both, {True}]
    assert choices("OPT", "norm_order") == [{"pre", "post"}]
    assert choices("OPT", "activation")[0] | choices("Starcoder2", "activation")[0] == set(huggingface.ACTIVATIONS)
    assert len(choices("Llama", "num_kv_heads")[0]) > 1
    assert len(choices("Mistral", "window")[0]) > 1


CELLS = {"elman": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
GATES = {"elman": ("",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}
"""The order in which torch stacks a cell's gates."""


def torch_network(model):
    """torch.nn's module with the weights of a recurrent torchref model. Of the two biases of a gate only the sum counts
    (but in the GRU's n), and torchref has one: the other is random here and taken off the first.
    """
    cfg = model.cfg
    options = {"nonlinearity": cfg.cell_activation} if cfg.cell == "elman" else {}
    network = CELLS[cfg.cell](cfg.embed_dim, cfg.embed_dim, cfg.num_layers, batch_first=True, **options).double()
    for layer, block in enumerate(model.blocks):
        biases = {"i": [], "h": []}
        for gate in GATES[cfg.cell]:
            pair = [block.cell[side + gate].bias for side in ("i", "h")]
            if None in pair:
                shift = torch.randn(cfg.embed_dim, dtype=torch.float64)
                pair = [-shift if bias is None else bias.detach() + shift for bias in pair]
            biases["i"].append(pair[0])
            biases["h"].append(pair[1])
        for side in ("i", "h"):
            weights = [block.cell[side + gate].weight for gate in GATES[cfg.cell]]
            with torch.no_grad():
                getattr(network, f"weight_{side}h_l{layer}").copy_(torch.cat(weights))
                getattr(network, f"bias_{side}h_l{layer}").copy_(torch.cat(biases[side]))
    return network


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("cell", "activation"), [("elman", "tanh"), ("elman", "relu"), ("lstm", "tanh"), ("gru", "tanh")]
)
def test_recurrent_models_are_those_of_torch(cell, activation, tied):
    torch.manual_seed(0)
    of_cell = {"family": "recurrent", "cell": cell, "cell_activation": activation, "tie_embeddings": tied}
    types = {"dtype": "float64", "param_dtype": "float64", "init": "torch"}
    cfg = ModelConfig(vocab_size=11, max_seq_len=9, num_layers=3, embed_dim=5, head_bias=True, **of_cell, **types)
    model = torchref.build_model(cfg)
    network = torch_network(model)
    embedding, head, bias = (
        p.detach().clone().requires_grad_() for p in (model.embedding.weight, model.head.weight, model.head.bias)
    )
    table = embedding if tied else head

    def theirs(tokens):
        return torch.nn.functional.linear(network(embedding[tokens])[0], table, bias)

    tokens = random_tokens(cfg, 3, 9)
    expected = logits_with_gradients(theirs, tokens)
    assert_close(logits_with_gradients(model, tokens), expected, FLOAT64)
    assert_close(model.embedding.weight.grad, embedding.grad, FLOAT64)
    assert_close(model.head.weight.grad, table.grad, FLOAT64)
    assert_close(model.head.bias.grad, bias.grad, FLOAT64)
    for layer, block in enumerate(model.blocks):
        for side in ("i", "h"):
            for i, gate in enumerate(GATES[cell]):
                part, rows = block.cell[side + gate], slice(5 * i, 5 * i + 5)
                assert_close(part.weight.grad, getattr(network, f"weight_{side}h_l{layer}").grad[rows], FLOAT64)
                if part.bias is not None:
                    assert_close(part.bias.grad, getattr(network, f"bias_{side}h_l{layer}").grad[rows], FLOAT64)


def test_a_recurrent_model_keeps_the_state_torch_returns():
    torch.manual_seed(0)
    types = {"dtype": "float64", "param_dtype": "float64", "init": "torch"}
    cfg = ModelConfig(vocab_size=7, max_seq_len=9, family="recurrent", num_layers=2, embed_dim=5, cell="lstm", **types)
    model = torchref.build_model(cfg)
    tokens = random_tokens(cfg, 3, 4)
    model(tokens, use_kv_cache=True)
    _, (hidden, cell) = torch_network(model)(model.embedding.weight[tokens])
    for layer, block in enumerate(model.blocks):
        assert_close(block.state[0].detach(), cell[layer].detach(), FLOAT64)
        assert_close(block.state[1].detach(), hidden[layer].detach(), FLOAT64)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_bigrams_are_tables_and_products_of_tables(cap):
    torch.manual_seed(0)
    shared = {"vocab_size": 7, "max_seq_len": 3, "final_softcap": cap, "dtype": "float64", "param_dtype": "float64"}
    tokens = torch.tensor([[0, 6, 6], [3, 1, 0]])
    table = torchref.build_model(ModelConfig(family="bigram", init="torch", **shared))
    product = torchref.build_model(
        ModelConfig(
            family="embedding_bigram", init="torch", embed_dim=5, tie_embeddings=False, head_bias=True, **shared
        )
    )
    rows = torch.nn.functional.linear(product.embedding.weight, product.head.weight, product.head.bias)
    for model, logits in ((table, table.table.weight), (product, rows)):
        expected = logits[tokens] if cap is None else cap * torch.tanh(logits[tokens] / cap)
        assert_close(model(tokens).detach(), expected.detach(), FLOAT64)
