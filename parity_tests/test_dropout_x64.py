"""Every dropout with the same masks in both frameworks: where it is applied, in which order, and its scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import SMALL
from conversions import random_params
from flax.traverse_util import flatten_dict
from tolerances import FLOAT64, assert_close

import torchref
from jaxlm.config import ModelConfig
from jaxlm.convert import to_torchref
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.convert.torchref import torch_name, turned
from jaxlm.model import layers
from jaxlm.model.build import build_model
from jaxlm.ops import attention
from jaxlm.training.step import batch_loss

pytestmark = pytest.mark.x64

WIDE = {**SMALL, "dtype": "float64", "param_dtype": "float64"}
RATES = {"dropout": 0.3, "attention_dropout": 0.4, "embedding_dropout": 0.25}
CASES = [
    ModelConfig(num_heads=4, num_kv_heads=2, **RATES, **WIDE),
    ModelConfig(
        num_heads=4, num_kv_heads=2, kv_sharing="summed_scores", norm_order="post", attention_dropout=0.5, **WIDE
    ),
    ModelConfig(num_heads=4, mlp_dim=0, position="sinusoidal", dropout=0.5, **WIDE),
    ModelConfig(family="recurrent", cell="gru", dropout=0.3, embedding_dropout=0.25, **WIDE),
    ModelConfig(
        family="embedding_bigram",
        vocab_size=13,
        max_seq_len=17,
        embed_dim=7,
        dropout=0.5,
        dtype="float64",
        param_dtype="float64",
    ),
]


class Masks:
    """Masks in the order in which they are asked for; a mask is the same for every shape of as many values."""

    def __init__(self):
        self.asked = []

    def draw(self, kept, shape):
        rng = np.random.default_rng(len(self.asked))
        self.asked.append((int(np.prod(shape)), round(float(kept), 6)))
        return (rng.random(int(np.prod(shape))) < kept).reshape(shape)


@pytest.mark.parametrize("cfg", CASES, ids=lambda cfg: f"{cfg.family}-{cfg.kv_sharing}-{cfg.position}")
def test_dropout_falls_where_torchs_does(cfg, monkeypatch):
    params, rng = random_params(cfg), np.random.default_rng(0)
    windows = rng.integers(0, cfg.vocab_size, (3, 12))
    ours, theirs = Masks(), Masks()
    for module in (attention, layers):
        monkeypatch.setattr(
            module, "draw_kept", lambda key, rate, shape, lines=None: jnp.asarray(ours.draw(1 - rate, shape))
        )

    def torch_dropout(x, rate=0.5, training=True):
        return x * to_tensor(theirs.draw(1 - rate, x.shape)) / (1 - rate) if training and rate else x

    monkeypatch.setattr(torch.nn.functional, "dropout", torch_dropout)
    model = build_model(cfg)
    loss, grads = jax.value_and_grad(batch_loss)(params, model, jnp.asarray(windows), jax.random.key(0))

    network = torchref.build_model(cfg).train()
    network.load_state_dict(to_torchref(cfg, params))
    tokens = to_tensor(windows)
    expected = torchref.cross_entropy(network(tokens[:, :-1]), tokens[:, 1:])
    expected.backward()
    assert ours.asked == theirs.asked
    assert len(ours.asked) >= 1
    assert_close(loss, expected.detach(), FLOAT64)
    for path, grad in flatten_dict(grads, sep="/").items():
        wanted = to_array(network.get_parameter(torch_name(path)).grad)
        if not path.endswith("key/bias"):  # zero but for rounding
            assert_close(grad, turned(path, wanted), FLOAT64)
    assert abs(float(batch_loss(params, model, jnp.asarray(windows))) - float(loss)) > 1e-3


def test_the_weighted_loss_is_torchs_and_that_of_its_library():
    from jaxlm.ops.loss import cross_entropy

    rng = np.random.default_rng(1)
    logits, targets, weights = rng.standard_normal((3, 5, 7)), rng.integers(0, 7, (3, 5)), rng.random((3, 5))
    weights[1:, 3:] = 0
    tensor, labels = torch.tensor(logits, requires_grad=True), torch.tensor(targets)
    expected = torchref.cross_entropy(tensor, labels, torch.tensor(weights))
    expected.backward()
    value, grad = jax.value_and_grad(cross_entropy)(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    assert_close(value, expected.detach(), FLOAT64)
    assert_close(grad, tensor.grad, FLOAT64)
    kept = weights > 0
    left_out = torch.nn.functional.cross_entropy(tensor.transpose(1, 2), labels.masked_fill(~torch.tensor(kept), -100))
    assert_close(
        cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(kept, float)), left_out.detach(), FLOAT64
    )
