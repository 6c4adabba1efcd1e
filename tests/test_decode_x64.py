"""The cached sampler against recomputing everything, in float64, where near-ties do not flip."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import apply, built, random_tokens
from tolerances import FLOAT64

from jaxlm.config import ModelConfig
from jaxlm.decode import generate

pytestmark = pytest.mark.x64

CFG = ModelConfig(
    vocab_size=11, max_seq_len=8, num_layers=2, embed_dim=12, num_heads=3, dtype="float64", param_dtype="float64"
)
NEW = 13


def recomputed(model, params, prompt, key, context):
    """Row r, token i by fold_in(fold_in(key, r), i) from a full pass over the latest `context` tokens."""
    rows = np.asarray(prompt)
    width = min(context, prompt.shape[1] + NEW)  # padded on the right to one shape: the past does not see it
    log_probs = []
    for i in range(NEW):
        latest = rows[:, -context:]
        padded = np.pad(latest, ((0, 0), (0, width - latest.shape[1])))
        logits = apply(model, params, jnp.asarray(padded))[0][:, latest.shape[1] - 1]
        keys = [jax.random.fold_in(jax.random.fold_in(key, r), i) for r in range(len(rows))]
        tokens = np.array([jax.random.categorical(k, row / 0.7) for k, row in zip(keys, logits, strict=True)])
        log_probs.append(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(rows)), tokens])
        rows = np.concatenate([rows, tokens[:, None].astype(np.int32)], axis=1)
    return rows[:, prompt.shape[1] :], np.stack(log_probs, axis=1)


OTHERS = {
    "bigram": {"family": "bigram"},
    "lstm": {"family": "recurrent", "cell": "lstm", "num_layers": 2, "embed_dim": 12},
    "local_scanned": {
        "num_layers": 2,
        "embed_dim": 12,
        "num_heads": 2,
        "position": "rope",
        "window": 3,
        "attention_impl": "local",
        "scan_layers": True,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_generate_draws_what_recomputing_draws_with_every_kind_of_state(name):
    cfg = ModelConfig(vocab_size=11, max_seq_len=8, dtype="float64", param_dtype="float64", **OTHERS[name])
    model, params = built(cfg)
    prompt, key = random_tokens(cfg, 2, 11), jax.random.key(3)
    out = generate(model, params, prompt, max_new_tokens=NEW, key=key, temperature=0.7)
    tokens, log_probs = recomputed(model, params, prompt, key, 1000)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_allclose(out.log_probs, log_probs, atol=FLOAT64)


@pytest.mark.parametrize("position", ["learned", "rope", "sinusoidal", "none"])
@pytest.mark.parametrize("prompt_len", [1, 8, 11])
def test_generate_draws_what_recomputing_draws_also_past_the_context(position, prompt_len):
    cfg = dataclasses.replace(CFG, position=position, window=None if position == "learned" else (3, None))
    model, params = built(cfg)
    prompt, key = random_tokens(cfg, 2, prompt_len), jax.random.key(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt .* pass the learned position table")
        out = generate(model, params, prompt, max_new_tokens=NEW, key=key, temperature=0.7)
    if position == "learned":  # the latest max_seq_len tokens, at positions from 0
        reference, context = model, 8
    else:  # every window at most max_seq_len, over the whole history
        reference, context = built(dataclasses.replace(cfg, window=(3, 8)))[0], 1000
    tokens, log_probs = recomputed(reference, params, prompt, key, context)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_allclose(out.log_probs, log_probs, atol=FLOAT64)
