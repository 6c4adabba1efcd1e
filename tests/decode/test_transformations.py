"""Decoding as a function of the parameters, inside jax.jit and jax.vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CFG, PROMPT
from support import built

from jaxlm.decode.beam_search import beam_search
from jaxlm.decode.generate import predict
from jaxlm.decode.score import score

MODEL, PARAMS = built(CFG)
FUNCTIONS = {
    "score": lambda params: score(MODEL, params, PROMPT),
    "predict": lambda params: predict(MODEL, params, PROMPT, 2),
    "beam_search": lambda params: beam_search(MODEL, params, PROMPT, max_new_tokens=2, beam_width=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_and_vmap_give_what_a_call_gives(name):
    function, close = FUNCTIONS[name], {"rtol": 1e-4, "atol": 1e-5}
    half = jax.tree.map(lambda leaf: leaf / 2, PARAMS)
    expected = [function(params) for params in (PARAMS, half)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), jax.jit(function)(PARAMS), expected[0])
    both = jax.vmap(function)(jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, half))
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, np.stack(b), **close), both, *expected)
    wrong = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)
    jax.jit(function)(wrong)  # there is no value to refuse
