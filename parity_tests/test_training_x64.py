"""Twenty steps of training on real text: jaxlm's training step against a plain torch loop, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT64, assert_close

import torchref
from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.convert import to_torchref
from jaxlm.convert.tensors import to_tensor
from jaxlm.data.batches import target_weights
from jaxlm.data.sources import fetch
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.model.build import build_model
from jaxlm.optim import build_optimizer
from jaxlm.parity import random_params
from jaxlm.parity.optimizer_steps import parameter_kinds, torch_optimizer
from jaxlm.training.step import init_state, train_step

pytestmark = pytest.mark.x64

STEPS, PAD = 20, 1
CFG = ModelConfig(
    vocab_size=65,
    max_seq_len=11,
    num_layers=2,
    embed_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    position="rope",
    window=(5, None),
    norm="rmsnorm",
    use_bias=False,  # without rope a key's bias has no gradient but rounding, which Adam blows up
    dtype="float64",
    param_dtype="float64",
)


@pytest.fixture(scope="module")
def batches():
    """[20, 4, 12] ids of the real text; spaces count as padding, so the loss is weighted."""
    text = fetch("tinyshakespeare").train[0].read_text()
    ids = CharTokenizer(text).encode(text)
    starts = np.random.default_rng(0).integers(0, len(ids) - 12, (STEPS, 4))
    return ids[starts[..., None] + np.arange(12)]


QUICK = ("adamw", "adamsn")


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "adam", "adafactor"))],
)
def test_twenty_steps_of_training_are_those_of_torch(name, batches):
    optim = OptimConfig(name=name, learning_rate=3e-2, schedule="constant", warmup_steps=0, clip_norm=5.0)
    model, params = build_model(CFG), random_params(CFG)
    tx = build_optimizer(optim, STEPS)

    @jax.jit
    def step(state, windows):
        return train_step(state, windows, model, tx, 0, weights=target_weights(windows, PAD))

    state, losses, norms = init_state(params, tx), [], []
    for windows in batches:
        state, metrics = step(state, jnp.asarray(windows))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    assert min(norms) < optim.clip_norm < max(norms)  # clipped in some steps and not in others

    theirs = torchref.build_model(CFG)
    theirs.load_state_dict(to_torchref(CFG, params))
    expected = train_in_torch(theirs, optim, batches)
    assert_close(losses, expected, FLOAT64)
    wanted = theirs.state_dict()
    for path, tensor in to_torchref(CFG, state.params).items():
        assert_close(tensor, wanted[path], FLOAT64)
    moved = max(float((wanted[n] - t).abs().max()) for n, t in to_torchref(CFG, params).items())
    assert moved > 0.05


def train_in_torch(model, optim, batches):
    """The losses of each step; the model is trained in place."""
    kinds = parameter_kinds(model)
    optimizer = torch_optimizer(optim, [(kinds[name], parameter) for name, parameter in model.named_parameters()])
    losses = []
    for windows in batches:
        tokens = to_tensor(windows).long()
        weights = (tokens[:, 1:] != PAD).double()
        loss = torchref.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], weights)
        optimizer.zero_grad()
        loss.backward()
        parameters = list(model.parameters())
        clipped = torchref.optim.clip_by_global_norm([p.grad for p in parameters], optim.clip_norm)
        for parameter, grad in zip(parameters, clipped, strict=True):
            parameter.grad = grad
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
