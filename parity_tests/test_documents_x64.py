"""Attention inside documents against torchref's whole mask, in float64: logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversions import random_params
from tolerances import FLOAT64, assert_close

import jaxlm
import torchref
from jaxlm.convert import from_torchref, to_torchref
from jaxlm.convert.tensors import to_tensor
from jaxlm.ops.masks import document_numbers

pytestmark = pytest.mark.x64

SIZES = {"num_layers": 2, "embed_dim": 24, "num_heads": 6, "max_seq_len": 17, "vocab_size": 11}


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("attention_impl", ["reference", "local"])
def test_packed_rows_have_the_logits_and_gradients_of_torch(position, window, num_kv_heads, attention_impl):
    cfg = jaxlm.ModelConfig(
        **SIZES,
        **{"position": position, "window": window, "num_kv_heads": num_kv_heads, "attention_impl": attention_impl},
        dtype="float64",
        param_dtype="float64",
    )
    params = random_params(cfg)
    tokens = np.random.default_rng(1).integers(cfg.vocab_size, size=(3, 17))
    tokens[:, [4, 5, 11]] = 0
    documents = document_numbers(jnp.asarray(tokens, jnp.int32), 0)
    weight = np.random.default_rng(2).standard_normal((3, 17, cfg.vocab_size))

    def weighted(params):
        logits = jaxlm.build_model(cfg).apply({"params": params}, jnp.asarray(tokens, jnp.int32), documents=documents)[
            0
        ]
        return (logits * weight).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    model = torchref.build_model(cfg).eval()
    model.load_state_dict(to_torchref(cfg, params), strict=True)
    found = model(to_tensor(tokens), documents=to_tensor(np.asarray(documents)))
    (found * to_tensor(weight)).sum().backward()
    assert_close(logits, found.detach(), FLOAT64)
    assert abs(model(to_tensor(tokens)).detach() - found.detach()).max() > 1e-3
    theirs = from_torchref(cfg, {name: tensor.grad for name, tensor in model.named_parameters()})
    scale = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for ours, reference in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        assert abs(np.asarray(ours) - np.asarray(reference)).max() <= FLOAT64 * scale
    assert torch.isfinite(found).all()
