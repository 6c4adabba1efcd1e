"""Both samplers past the context, against a full pass for each token, in float64."""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_x64 import CFG, KEY
from support import apply, built, random_tokens
from tolerances import FLOAT64

from jaxlm.decode.generate import generate
from jaxlm.decode.uncached import generate_naive
from jaxlm.errors import ContextWarning

pytestmark = pytest.mark.x64


def written_out(model, params, prompt, key, context, count):
    """Row r, token i by fold_in(fold_in(key, r), i) from a full pass over the latest `context` tokens, one by one."""
    rows = np.asarray(prompt)
    width = min(context, prompt.shape[1] + count)  # padded on the right to one shape: the past does not see it
    log_probs = []
    for i in range(count):
        latest = rows[:, -context:]
        padded = np.pad(latest, ((0, 0), (0, width - latest.shape[1])))
        logits = apply(model, params, jnp.asarray(padded))[0][:, latest.shape[1] - 1]
        keys = [jax.random.fold_in(jax.random.fold_in(key, r), i) for r in range(len(rows))]
        tokens = np.array([jax.random.categorical(k, row / 0.7) for k, row in zip(keys, logits, strict=True)])
        log_probs.append(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(rows)), tokens])
        rows = np.concatenate([rows, tokens[:, None].astype(np.int32)], axis=1)
    return rows[:, prompt.shape[1] :], np.stack(log_probs, axis=1)


QUICK = [("learned", 1), ("learned", 8), ("learned", 11), ("rope", 11), ("sinusoidal", 1), ("none", 8)]
OTHERS = [pair for pair in itertools.product(["rope", "sinusoidal", "none"], [1, 8, 11]) if pair not in QUICK]


@pytest.mark.parametrize(
    ("position", "prompt_len"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_past_the_context_both_samplers_draw_what_is_written_out(position, prompt_len):
    cfg = dataclasses.replace(
        CFG, max_seq_len=8, position=position, window=None if position == "learned" else (3, None)
    )
    model, params = built(cfg)
    prompt = random_tokens(cfg, 2, prompt_len)
    if position == "learned":  # the latest max_seq_len tokens, at positions from 0
        reference, context = model, 8
    else:  # every window at most max_seq_len, over the whole history
        reference, context = built(dataclasses.replace(cfg, window=(3, 8)))[0], 1000
    tokens, log_probs = written_out(reference, params, prompt, KEY, context, 13)
    for sampler in (generate, generate_naive):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextWarning)
            out = sampler(model, params, prompt, max_new_tokens=13, key=KEY, temperature=0.7)
        np.testing.assert_array_equal(out.tokens, tokens)
        np.testing.assert_allclose(out.log_probs, log_probs, atol=FLOAT64)
