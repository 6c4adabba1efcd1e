"""Imported models trained on: the losses are those of transformers' own training, from the same weights and batches."""

import family_models
import huggingface
import jax
import numpy as np
import optax
import pytest
import torch

import jaxlm
from jaxlm import convert
from jaxlm.config import OptimConfig
from jaxlm.ops.loss import cross_entropy
from jaxlm.optim import build_optimizer

pytestmark = pytest.mark.x64

STEPS, ROWS, LENGTH = 50, 4, 12
RATE, BETAS, EPS, CLIP = 3e-3, (0.9, 0.95), 1e-8, 1.0
OPTIM = {"name": "adamw", "learning_rate": RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1}
OPTIM |= {"b1": BETAS[0], "b2": BETAS[1], "eps": EPS, "clip_norm": CLIP}


def batches(vocab_size):
    rng = np.random.default_rng(3)
    return [rng.integers(0, vocab_size, (ROWS, LENGTH + 1)) for _ in range(STEPS)]


def losses_in_torch(model, windows):
    """transformers' loss, torch's AdamW and clipping; matrices decay, vectors do not."""
    model.train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": OPTIM["weight_decay"]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)
    losses = []
    for rows in windows:
        tokens = torch.tensor(rows)
        with huggingface.in_float64():
            logits = model(tokens[:, :-1], use_cache=False).logits
            loss = model.loss_function(logits, None, logits.shape[-1], shift_labels=tokens[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in parameters))
        for parameter in parameters:  # torch's own clipping adds 1e-6 to the norm
            parameter.grad.mul_(min(1.0, CLIP / float(norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("case", [pytest.param("gpt2", marks=pytest.mark.slow), "llama 3"])
def test_fifty_steps_have_the_losses_of_transformers(case):
    theirs = family_models.model(case)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    cfg, params = convert.from_hf(theirs)
    windows = batches(cfg.vocab_size)
    model, optimizer = jaxlm.build_model(cfg), build_optimizer(OptimConfig(**OPTIM), STEPS, params)

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            return cross_entropy(model.apply({"params": params}, rows[:, :-1])[0], rows[:, 1:])

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, ours = optimizer.init(params), []
    for rows in windows:
        params, state, value = step(params, state, rows)
        ours.append(float(value))
    expected = losses_in_torch(theirs, windows)
    assert np.max(np.abs(np.array(ours) - expected)) < 1e-9
    assert expected[-1] < expected[0] - 0.1
