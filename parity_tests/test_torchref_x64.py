"""torchref against jaxlm in float64: converted models, the explicit attention head, the filters of sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversions import CONFIGS, assert_bitwise, random_params
from tolerances import FLOAT64, assert_close

import jaxlm
import torchref
from jaxlm.convert import from_torchref, to_torchref
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.decode.filters import FilterFlags, FilterValues, filter_logits
from jaxlm.ops.self_attention import self_attention_grads, self_attention_values
from torchref.sampling import filtered

pytestmark = pytest.mark.x64


def in_float64(name):
    return dataclasses.replace(CONFIGS[name], dtype="float64", param_dtype="float64")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_converted_models_give_the_same_logits(name):
    cfg = in_float64(name)
    params = random_params(cfg)
    state = to_torchref(cfg, params)
    assert {tensor.dtype for tensor in state.values()} == {torch.float64}
    assert_bitwise(from_torchref(cfg, state), params)
    model = torchref.build_model(cfg).eval()
    model.load_state_dict(state, strict=True)
    tokens = np.random.default_rng(1).integers(cfg.vocab_size, size=(3, 7))
    logits, _ = jax.jit(jaxlm.build_model(cfg).apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    assert_close(model(to_tensor(tokens)).detach(), logits, FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_what_a_head_stores_is_what_jaxlm_names(batch, causal):
    rng = np.random.default_rng(0)
    shapes = (*batch, 5, 7), (7, 4), (7, 4), (7, 3), (*batch, 5, 3)
    X, W_k, W_q, W_v, upstream = (rng.standard_normal(shape) for shape in shapes)
    head = torchref.Attention(W_k, W_q, W_v, causal=causal)
    result = head.forward(X)
    dLdX = head.backward(upstream)
    values = self_attention_values(*map(jnp.asarray, (X, W_k, W_q, W_v)), causal)
    grads = self_attention_grads(*map(jnp.asarray, (X, W_k, W_q, W_v, upstream)), causal)
    assert_close(dLdX, grads.dLdX, FLOAT64)
    assert_close(result, values.Xnew, FLOAT64)
    named = {**values._asdict(), **grads._asdict()}
    names = set(named) - {"Xnew", "dLdX"}
    assert names == set(vars(head)) - {"X", "W_k", "W_q", "W_v", "causal"} == set(torchref.Attention.__annotations__)
    for name in names:
        assert_close(getattr(head, name), named[name], FLOAT64)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (1.0, 1, None), (2.0, 5, None), (1.5, None, 0.6), (1.0, None, 0.05), (0.8, 7, 0.9)],
)
def test_filters_are_those_of_jaxlm(temperature, top_k, top_p):
    logits = 3 * np.random.default_rng(0).standard_normal((50, 23))
    flags = FilterFlags(top_k_ceiling=None if top_k is None else 7, top_p=top_p is not None)
    values = {"min_p": 0.0, "repetition_penalty": 1.0, "stops": np.zeros(23, bool), "forbidden": np.zeros(23, bool)}
    values |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    values = FilterValues(**{name: np.asarray(value) for name, value in values.items()})
    expected = np.asarray(filter_logits(jnp.asarray(logits) / temperature, flags, values))
    result = to_array(filtered(to_tensor(logits), temperature, top_k, top_p))
    kept = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(result), kept)
    assert_close(result[kept], expected[kept], FLOAT64)
    assert kept.all() == (top_k is None and top_p is None)
