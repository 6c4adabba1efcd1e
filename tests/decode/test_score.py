"""`score`: what is refused, padding, float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CFG, PROMPT
from support import built, random_tokens

from jaxlm.decode.score import score
from jaxlm.errors import UserError


def test_weights_leave_padding_out():
    model, params = built(CFG)
    padded = np.concatenate([PROMPT, np.zeros((2, 3), np.int32)], axis=1)
    weights = np.array([[1, 1, 1, 1, 0, 0, 0]] * 2, np.float32)
    np.testing.assert_allclose(score(model, params, padded, weights), score(model, params, PROMPT), rtol=1e-5)
    assert (score(model, params, padded) < score(model, params, PROMPT)).all()


def test_bad_arguments_are_named():
    model, params = built(CFG)
    learned = built(dataclasses.replace(CFG, position="learned", max_seq_len=8))
    with pytest.raises(UserError, match=r"tokens has shape \(2, 1\)"):
        score(model, params, PROMPT[:, :1])
    with pytest.raises(UserError, match="tokens holds ids 0 to 11: the vocabulary has 0 to 10"):
        score(model, params, jnp.array([[0, 11]]))
    with pytest.raises(UserError, match=r"weights has shape \(2, 5\): give one for each target, \(2, 4\)"):
        score(model, params, PROMPT, jnp.ones((2, 5)))
    with pytest.raises(UserError, match="9 tokens are beyond the learned position table, max_seq_len = 8: give fewer"):
        score(*learned, random_tokens(CFG, 1, 10))
