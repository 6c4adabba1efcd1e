"""Prefill in float64: a prompt in pieces is the prompt."""

import pytest
from decoding_x64 import CFG, KEY, assert_same
from support import built, random_tokens

from jaxlm.decode.generate import generate
from jaxlm.decode.prefill import _piece

pytestmark = pytest.mark.x64


def test_a_prompt_in_pieces_is_the_prompt(monkeypatch):
    model, params = built(CFG)
    prompt, arguments = random_tokens(CFG, 2, 37), {"max_new_tokens": 5, "key": KEY, "prompt_lengths": [37, 20]}
    whole = generate(model, params, prompt, **arguments)
    monkeypatch.setattr("jaxlm.decode.prefill.PREFILL", 16)
    for first in (16, 32):
        monkeypatch.setattr("jaxlm.decode.prefill.FIRST", first)
        assert_same(generate(model, params, prompt, **arguments), whole)


@pytest.mark.parametrize(
    ("left", "rows", "first", "width"),
    [
        (1, 1, True, 16),
        (17, 1, False, 32),
        (500, 300, True, 512),
        (700, 1, True, 512),
        (800, 1, True, 1024),
        (800, 1, False, 512),
        (5000, 1, True, 2048),
        (5000, 128, True, 1024),
    ],
)
def test_pieces_are_wide_where_that_costs_little_padding_and_memory(left, rows, first, width):
    assert _piece(left, rows, first) == width
