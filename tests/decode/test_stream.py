"""Tokens as they come, rows that end with a stop string."""

import numpy as np
import pytest
from decoding import CFG, KEY, PROMPT, sampled
from support import built

from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.decode.generate import _advance
from jaxlm.decode.generation import TokenBlock
from jaxlm.decode.stream import steps_until_stop, stream
from jaxlm.decode.text_stream import TextStream
from jaxlm.errors import UserError

LETTERS = CharTokenizer("abcdefghijk")


def test_a_stop_string_ends_its_row_in_the_stream():
    model, params = built(CFG)
    arguments = {"max_new_tokens": 9, "key": KEY, "num_samples": 2}
    whole = np.asarray(sampled(PROMPT, num_samples=2).tokens)
    text = LETTERS.decode(whole[0])
    string = text[2:4]
    streamed = np.stack(
        list(stream(model, params, PROMPT, stop_strings=["zz", string], tokenizer=LETTERS, **arguments)), axis=1
    )
    for row, tokens in zip(streamed, whole, strict=True):
        place = LETTERS.decode(tokens).find(string)
        length = 9 if place < 0 else place + 2
        np.testing.assert_array_equal(row[:length], tokens[: len(row[:length])])
        assert (row[length:] == -1).all()


def test_a_stream_begins_before_all_tokens_are_there(monkeypatch):
    calls, advance = [], _advance

    def counted(*args, **kwargs):
        calls.append(1)
        return advance(*args, **kwargs)

    monkeypatch.setattr("jaxlm.decode.generate._advance", counted)
    model, params = built(CFG)
    tokens = stream(model, params, PROMPT, max_new_tokens=17, key=KEY)
    next(tokens)
    assert len(calls) == 1
    assert len(list(tokens)) == 16
    assert len(calls) == 3


def test_a_stop_string_needs_a_tokenizer_and_a_character():
    model, params = built(CFG)
    arguments = {"max_new_tokens": 9, "key": KEY}
    with pytest.raises(UserError, match=r"stop_strings = \['x'\]: give a tokenizer"):
        stream(model, params, PROMPT, stop_strings=["x"], **arguments)
    with pytest.raises(UserError, match=r"stop_strings = \['x', ''\]: give a tokenizer, and no empty string"):
        stream(model, params, PROMPT, stop_strings=["x", ""], tokenizer=LETTERS, **arguments)


def test_a_row_ended_by_a_stop_string_holds_the_stop_token():
    model, params = built(CFG)
    whole = np.asarray(sampled(PROMPT, num_samples=2, stop_token=10).tokens)
    string = LETTERS.decode(whole[0, 2:4])
    arguments = {"max_new_tokens": 9, "key": KEY, "num_samples": 2, "stop_token": 10}
    streamed = np.stack(list(stream(model, params, PROMPT, stop_strings=[string], tokenizer=LETTERS, **arguments)), 1)
    place = LETTERS.decode(whole[0]).find(string) + 2
    np.testing.assert_array_equal(streamed[0, :place], whole[0, :place])
    assert (streamed[0, place:] == 10).all()


class Parts:
    """A tokenizer of the bytes of a text, in parts."""

    def __init__(self, *parts):
        self.parts = parts

    def decode(self, ids):
        return b"".join(self.parts[i] for i in ids).decode(errors="replace")


def test_steps_end_when_every_row_has_a_stop_token_or_a_stop_string():
    tokenizer = Parts(b"th", b"e ", b"\xc3", b"\xa9t", b"<end>")
    tokens = np.array([[0, 1, 2, 3, 0, 1], [0, 4, 0, 0, 0, 0], [1, 0, 1, 4, 2, 3]])
    blocks = (TokenBlock(part, -1.0 - part) for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]))
    texts = [TextStream(tokenizer.decode, ["ét", "he e"]) for _ in range(3)]
    steps = list(steps_until_stop(blocks, [4], texts))
    assert len(steps) == 4  # of 6: all are done then
    assert np.stack([step.tokens for step in steps], axis=1).tolist() == [[0, 1, 2, 3], [0, 4, 4, 4], [1, 0, 1, 4]]
    assert [step.log_probs.tolist() for step in steps][2:] == [[-3, 0, -2], [-4, 0, -5]]
    assert [step.pieces for step in steps] == [["t", "t", "e "], ["", "", "t"], ["", "", ""], ["he ", "", ""]]
    assert [text.stopped for text in texts] == [True, False, False]
    assert texts[2].finish() == "he "


def test_without_stop_strings_no_text_is_decoded():
    steps = list(steps_until_stop([TokenBlock(np.array([[3, 5, 5]]), np.zeros((1, 3)))], [5]))
    assert [(step.tokens.tolist(), step.pieces) for step in steps] == [([3], [""]), ([5], [""])]


def test_each_of_several_stop_tokens_ends_a_row_of_the_stream():
    model, params = built(CFG)
    free = np.asarray(sampled(PROMPT).tokens)
    stops = [int(free[0, 2]), int(free[1, 4])]
    out = sampled(PROMPT, stop_token=stops)
    streamed = np.stack(list(stream(model, params, PROMPT, max_new_tokens=9, key=KEY, stop_token=stops)), axis=1)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])
    assert streamed.shape[1] == int(out.lengths.max()) + 1 < 9


def test_a_row_ended_by_a_stop_string_holds_the_smallest_stop_token():
    blocks = [TokenBlock(np.array([[1, 2, 8], [3, 7, 7], [3, 3, 8]]), np.zeros((3, 3)))]
    texts = [TextStream(LETTERS.decode, [string]) for string in ("b", "zz", "zz")]
    steps = list(steps_until_stop(blocks, [8, 7], texts))
    assert np.stack([step.tokens for step in steps], axis=1).tolist() == [[1, 7, 7], [3, 7, 7], [3, 3, 8]]
