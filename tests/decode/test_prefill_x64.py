"""Prefill in float64: a prompt in pieces is the prompt."""

import pytest
from decoding_x64 import CFG, KEY, assert_same
from support import built, random_tokens

from jaxlm.decode.generate import generate

pytestmark = pytest.mark.x64


def test_a_prompt_in_pieces_is_the_prompt(monkeypatch):
    model, params = built(CFG)
    prompt, arguments = random_tokens(CFG, 2, 37), {"max_new_tokens": 5, "key": KEY, "prompt_lengths": [37, 20]}
    whole = generate(model, params, prompt, **arguments)
    monkeypatch.setattr("jaxlm.decode.prefill.PREFILL", 16)
    assert_same(generate(model, params, prompt, **arguments), whole)
