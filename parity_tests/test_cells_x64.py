"""The recurrent family against torch.nn.RNN, LSTM and GRU with the same weights, values and gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import built, random_tokens
from tolerances import FLOAT64, assert_close

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_tensor
from jaxlm.ops.attention import softcap
from jaxlm.ops.self_attention import self_attention

pytestmark = pytest.mark.x64

GATES = {"elman": ("",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}
"""The order in which torch stacks a cell's gates."""


def torch_network(kind, activation, params, width, layers):
    """torch's module with a jaxlm network's weights. torch has two biases for each gate, Linen one (GRU's n: two)."""
    options = {"nonlinearity": activation} if kind == "elman" else {}
    module = {"elman": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
    network = module(width, width, num_layers=layers, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for layer in range(layers):
            cell = params[f"block_{layer}"]["cell"]
            for side, name in (("i", "ih"), ("h", "hh")):
                parts = [cell[f"{side}{gate}"] for gate in GATES[kind]]
                kernels = np.concatenate([part["kernel"].T for part in parts])
                biases = np.concatenate([part.get("bias", np.zeros(width)) for part in parts])
                getattr(network, f"weight_{name}_l{layer}").copy_(to_tensor(kernels))
                getattr(network, f"bias_{name}_l{layer}").copy_(to_tensor(biases))
    return network


@pytest.mark.parametrize(
    ("kind", "activation"), [("elman", "tanh"), ("elman", "relu"), ("lstm", "tanh"), ("gru", "tanh")]
)
def test_recurrent_networks_are_those_of_torch(kind, activation):
    cfg = ModelConfig(
        vocab_size=11,
        max_seq_len=9,
        family="recurrent",
        num_layers=2,
        embed_dim=6,
        cell=kind,
        cell_activation=activation,
        dtype="float64",
        param_dtype="float64",
    )
    model, params = built(cfg)
    tokens, weight = random_tokens(cfg, 3, 9), np.random.default_rng(0).standard_normal((3, 9, 11))
    table = to_tensor(params["embedding"]).requires_grad_()
    hidden, state = torch_network(kind, activation, params, 6, 2)(table[to_tensor(tokens)])
    expected = hidden @ table.T
    expected.backward(to_tensor(weight))

    def loss(table):
        return (model.apply({"params": {**params, "embedding": table}}, tokens)[0] * weight).sum()

    logits, cache = model.apply({"params": params}, tokens, cache=model.init_cache(3, 9))
    assert_close(logits, expected.detach(), FLOAT64)
    assert_close(jax.grad(loss)(params["embedding"]), table.grad, FLOAT64)
    last = [layer[1] if kind == "lstm" else layer for layer in cache.layers]  # the hidden state
    assert_close(jnp.stack(last), (state[0] if kind == "lstm" else state).detach(), FLOAT64)


def test_self_attention_and_its_derivative_are_torchs():
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape) for shape in ((2, 5, 7), (7, 4), (7, 4), (7, 3))]
    x, w_k, w_q, w_v = (torch.tensor(a, requires_grad=True) for a in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v, is_causal=True)
    upstream = rng.standard_normal(expected.shape)
    expected.backward(to_tensor(upstream))
    value, pull = jax.vjp(lambda *a: self_attention(*a, True), *map(jnp.asarray, inputs))
    assert_close(value, expected.detach(), FLOAT64)
    for ours, theirs in zip(pull(jnp.asarray(upstream)), (x, w_k, w_q, w_v), strict=True):
        assert_close(ours, theirs.grad, FLOAT64)


def test_soft_caps_are_those_of_gemma():
    """transformers' eager attention of Gemma 2, with its cap on the scores."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    from jaxlm.ops.attention import attend

    rng = np.random.default_rng(1)
    q, k, v = (3 * rng.standard_normal((2, 5, heads, 4)) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    module.eval()
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    tensors = (torch.tensor(a).transpose(1, 2) for a in (q, k, v))
    expected, _ = eager_attention_forward(module, *tensors, mask, scaling=0.5, softcap=2.0)
    causal = jnp.tri(5, dtype=bool)[None]
    ours = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal, cap=2.0)
    assert_close(ours, expected, 1e-6)  # that function takes its softmax in float32
    uncapped = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal)
    assert np.abs(np.asarray(uncapped - ours)).max() > 0.1
    assert_close(softcap(jnp.asarray(q), 2.0), 2 * torch.tanh(torch.tensor(q) / 2), FLOAT64)
