"""jaxlm's pure functions against PyTorch's, values and gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import FLOAT64, assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_tensor
from jaxlm.model.layers import Norm
from jaxlm.model.transformer import ACTIVATIONS, GATED
from jaxlm.ops.attention import attend
from jaxlm.ops.loss import cross_entropy
from jaxlm.ops.matmul import matmul
from jaxlm.ops.positions import apply_rope, rope_angles

pytestmark = pytest.mark.x64


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def assert_same_value_and_gradients(ours, theirs, inputs):
    """Compares f(*inputs) and the gradients of sum(f * w), w random, of a JAX and a torch function."""
    torch_inputs = [torch.tensor(x, requires_grad=True) for x in inputs]
    expected = theirs(*torch_inputs)
    value, pull = jax.vjp(ours, *map(jnp.asarray, inputs))
    assert value.dtype == jnp.float64
    assert_close(value, expected.detach(), FLOAT64)
    weight = np.random.default_rng(1).standard_normal(value.shape)
    expected.backward(to_tensor(weight))
    for mine, tensor in zip(pull(jnp.asarray(weight)), torch_inputs, strict=True):
        assert_close(mine, tensor.grad, FLOAT64)


def test_matmul():
    assert_same_value_and_gradients(matmul, torch.matmul, arrays((3, 5, 7), (7, 11)))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("relu", torch.relu),
        ("silu", torch.nn.functional.silu),
        ("swiglu", torch.nn.functional.silu),
        ("geglu", torch.nn.functional.gelu),
        ("geglu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations(name, theirs):
    assert {"swiglu", "geglu", "geglu_tanh"} == set(GATED)
    assert_same_value_and_gradients(ACTIVATIONS[name], theirs, [3 * x for x in arrays((5, 7))])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(kind):
    cfg = ModelConfig(vocab_size=5, max_seq_len=3, norm=kind, norm_eps=1e-3, dtype="float64", param_dtype="float64")
    norm = Norm(cfg)

    def ours(x, scale, bias):
        params = {"scale": scale, "bias": bias} if kind == "layernorm" else {"scale": scale}
        return norm.apply({"params": params}, x)

    def theirs(x, scale, bias):
        if kind == "layernorm":
            return torch.nn.functional.layer_norm(x, (7,), scale, bias, eps=1e-3)
        return torch.nn.functional.rms_norm(x, (7,), scale, eps=1e-3) + 0 * bias.sum()

    assert_same_value_and_gradients(ours, theirs, arrays((3, 5, 7), (7,), (7,)))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(kv_heads, window):
    distance = np.arange(7)[:, None] - np.arange(7)
    mask = (distance >= 0) & (distance < (window or 99))

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.tensor(mask), enable_gqa=True)
        return out.transpose(1, 2)

    inputs = arrays((2, 7, 6, 4), (2, 7, kv_heads, 4), (2, 7, kv_heads, 5))
    assert_same_value_and_gradients(lambda q, k, v: attend(q, k, v, jnp.asarray(mask)[None]), theirs, inputs)


def test_rope_in_half_layout_is_that_of_hugging_face():
    positions, inverse = np.array([[0, 1, 5, 900]]), 500.0 ** -(np.arange(0, 6, 2) / 6)
    angles = torch.tensor(positions[..., None] * np.concatenate([inverse, inverse]))

    def theirs(q):
        return apply_rotary_pos_emb(q, q, angles.cos(), angles.sin(), unsqueeze_dim=2)[0]

    def ours(q):
        return apply_rope(q, rope_angles(jnp.asarray(positions), 6, 500.0, jnp.float64), "half")

    assert_same_value_and_gradients(ours, theirs, arrays((2, 4, 3, 6)))


def test_rope_in_interleaved_layout_is_metas_complex_product():
    positions = np.arange(4)[None]
    angles = torch.tensor(positions[..., None] * 10000.0 ** -(np.arange(0, 6, 2) / 6))
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]

    def theirs(q):
        return torch.view_as_real(torch.view_as_complex(q.reshape(2, 4, 3, 3, 2)) * turn).flatten(3)

    def ours(q):
        return apply_rope(q, rope_angles(jnp.asarray(positions), 6, 10000.0, jnp.float64), "interleaved")

    assert_same_value_and_gradients(ours, theirs, arrays((2, 4, 3, 6)))


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted):
    targets, weights = np.array([[1, 4, 0], [2, 2, 3]]), np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    kept = torch.tensor(np.where(weights > 0, targets, -100) if weighted else targets)

    def ours(logits):
        return cross_entropy(logits, jnp.asarray(targets), jnp.asarray(weights) if weighted else None)

    def theirs(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), kept.flatten())

    assert_same_value_and_gradients(ours, theirs, arrays((2, 3, 5)))
