"""`score` against the log-probabilities of `generate`, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from decoding_x64 import CFG, KEY
from support import built, random_tokens
from tolerances import FLOAT64

from jaxlm.decode.generate import generate
from jaxlm.decode.score import score

pytestmark = pytest.mark.x64


def test_score_is_the_log_probability_of_what_follows_the_first_token():
    model, params = built(CFG)
    prompt = random_tokens(CFG, 2, 5)
    out = generate(model, params, prompt, max_new_tokens=6, key=KEY, temperature=0.5, top_k=3)
    whole = jnp.concatenate([prompt, out.tokens], axis=1)
    scores = score(model, params, whole)
    np.testing.assert_allclose(scores - score(model, params, prompt), out.log_probs.sum(axis=1), atol=FLOAT64)
    weights = np.zeros((2, 10))
    weights[:, 4:] = 0.5
    np.testing.assert_allclose(score(model, params, whole, weights), 0.5 * out.log_probs.sum(axis=1), atol=FLOAT64)
