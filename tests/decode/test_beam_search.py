"""Beam search: what is refused; test_beam_search_x64.py has what it finds."""

import dataclasses

import pytest
from decoding import CFG, PROMPT
from support import built

from jaxlm.decode.beam_search import beam_search
from jaxlm.errors import UserError


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beam_width": 0}, "beam_width = 0: give a whole number of at least 1"),
        ({"length_penalty": -1.0}, "length_penalty = -1.0: give a finite number of at least 0"),
        ({"length_penalty": float("nan")}, "length_penalty = nan"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop_token": 11}, "stop_token = 11: the vocabulary has 0 to 10"),
        ({"forbidden_tokens": [3, 11]}, "forbidden_tokens holds 11: the vocabulary has 0 to 10"),
        ({"forbidden_tokens": range(11)}, "forbidden_tokens holds all 11 tokens: leave one"),
        ({"prompt_lengths": [5, 6]}, r"prompt_lengths = \[5, 6\]"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(UserError, match=words):
        beam_search(*built(CFG), PROMPT, **{"max_new_tokens": 5, "beam_width": 2, **change})


def test_a_learned_table_is_not_searched_past_its_end():
    learned = built(dataclasses.replace(CFG, position="learned", max_seq_len=8))
    assert beam_search(*learned, PROMPT, max_new_tokens=4, beam_width=2).tokens.shape == (2, 2, 4)
    with pytest.raises(UserError, match="prompt 5 . 5 new tokens pass the capacity 8: give fewer$"):
        beam_search(*learned, PROMPT, max_new_tokens=5, beam_width=2)
