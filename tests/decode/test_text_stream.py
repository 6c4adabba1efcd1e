"""The text of tokens that come one at a time."""

import pytest
from foreign_tokenizers import llama2_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer
from jaxlm.decode.text_stream import WINDOW, TextStream

BPE = BPETokenizer.train(["naïve café: the other thé there, then this 🦜 " * 20], 290)


def pieces_of(tokens, tokenizer, stop_strings=()):
    stream = TextStream(tokenizer.decode, stop_strings)
    return [*(stream.push(token) for token in tokens), stream.finish()], stream.stopped


CHARACTER = BPE.encode("🦜").tolist()


@given(st.lists(st.integers(0, BPE.vocab_size - 1) | st.sampled_from(BPE.encode("🦜é€�").tolist()), max_size=40))
@example(CHARACTER)
@example([*CHARACTER[:2], *CHARACTER])
@example(CHARACTER[:-1])
def test_pieces_join_to_the_text_and_are_never_taken_back(tokens):
    pieces, _ = pieces_of(tokens, BPE)
    whole = BPE.decode(tokens)
    assert "".join(pieces) == whole
    for end in range(len(tokens)):  # what is shown by then stays true, whatever follows
        shown = "".join(pieces[: end + 1])
        assert whole.startswith(shown)
        assert len(BPE.decode(tokens[: end + 1])) - len(shown) <= 1


def test_half_a_character_is_held_back():
    tokens = BPE.encode("a🐙b").tolist()
    assert len(tokens) > 3
    pieces, _ = pieces_of(tokens, BPE)
    assert [piece for piece in pieces if piece] == ["a", "🐙", "b"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example("aab", ["ab"])
@example("abab", ["abb", "ba"])
@example("baa", ["a", "baa"])
@example("ab", ["b", "ab"])
def test_a_text_ends_before_its_first_stop_string_and_shows_nothing_of_it(text, stop_strings):
    tokenizer = CharTokenizer("ab")
    pieces, stopped = pieces_of(tokenizer.encode(text).tolist(), tokenizer, stop_strings)
    places = [(text.find(string) + len(string), text.find(string)) for string in stop_strings if string in text]
    expected = text[: min(places)[1]] if places else text  # the first to be whole ends it
    assert ("".join(pieces), stopped) == (expected, bool(places))
    for end in range(len(text)):
        seen, shown = text[: end + 1], "".join(pieces[: end + 1])
        if not any(string in seen for string in stop_strings):  # all is shown but what may begin a stop string
            assert (
                shown
                + next(
                    held
                    for start in range(len(seen) + 1)
                    if not (held := seen[start:]) or any(string.startswith(held) for string in stop_strings)
                )
                == seen
            )


def test_the_work_for_a_character_does_not_grow_with_a_stop_string():
    """Each is compared with the string about twice: here are 2,000 that nearly spell it, again and again."""

    class Counted(str):
        looks = 0

        def __getitem__(self, place):
            Counted.looks += 1
            return super().__getitem__(place)

    stop = Counted("a" * 499 + "b")
    tokenizer, text = CharTokenizer("ab"), ("a" * 499 + "a") * 4
    pieces, stopped = pieces_of(tokenizer.encode(text).tolist(), tokenizer, [stop])
    assert ("".join(pieces), stopped) == (text, False)
    assert Counted.looks < 4 * (len(text) + len(stop))


def test_a_stop_string_may_end_in_the_middle_of_a_token():
    tokens = BPE.encode("the other there").tolist()
    assert not any(BPE.decode(tokens[:end]).endswith("e oth") for end in range(len(tokens)))
    pieces, stopped = pieces_of(tokens, BPE, ["e oth"])
    assert ("".join(pieces), stopped) == ("th", True)
    pieces, _ = pieces_of(tokens, BPE, ["ther", "oth"])  # both in one token
    assert "".join(pieces) == "the "


class Counting:
    """A tokenizer of bytes that notes how many tokens each call decodes."""

    def __init__(self):
        self.lengths = []

    def decode(self, ids):
        self.lengths.append(len(ids))
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("tokens", [b"abc ", "🦜é".encode(), b"\x80", b"\xf0\x9f", b"\xe2"], ids=str)
def test_the_work_for_a_token_does_not_grow_with_the_text(tokens):
    tokenizer, count = Counting(), 400
    stream = TextStream(tokenizer.decode, ["never", "x" * 30])
    pieces = [stream.push(token) for token in tokens * count]
    calls = len(tokenizer.lengths)
    assert calls <= 1.2 * count * len(tokens)
    assert max(tokenizer.lengths) <= WINDOW
    pieces.append(stream.finish())
    assert "".join(pieces) == (tokens * count).decode(errors="replace")


@given(st.lists(st.integers(0, 255) | st.sampled_from([*"🦜é€".encode()]), max_size=60))
def test_bytes_join_to_what_they_spell_whatever_they_are(tokens):
    pieces, _ = pieces_of(tokens, Counting())
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")


class Words:
    """A tokenizer that leaves out the space before the first word it decodes, as SentencePiece's does."""

    WORDS = (" the", " cat", "s", " sat", " on", " mat", ".")

    def decode(self, ids):
        return "".join(self.WORDS[i] for i in ids).removeprefix(" ")


@given(st.lists(st.integers(0, 6), max_size=50))
@example([0, 1, 3, 4, 0, 5] * 8)
def test_a_tokenizer_may_decode_a_token_otherwise_alone_than_after_others(tokens):
    pieces, _ = pieces_of(tokens, Words())
    assert "".join(pieces) == Words().decode(tokens)


def test_a_stop_string_across_many_tokens_is_found_past_the_window():
    text = "ab" * 20 + "STOP" * 9 + "c"
    stop = "b" + "STOP" * 9
    tokenizer = CharTokenizer(set(text))
    pieces, stopped = pieces_of(tokenizer.encode(text).tolist(), tokenizer, [stop])
    assert len(stop) > 2 * WINDOW
    assert ("".join(pieces), stopped) == ("ab" * 19 + "a", True)


def test_the_first_bytes_of_a_character_are_no_stop_string():
    parrot = "🦜".encode()
    stream = TextStream(Counting().decode, ["\ufffd"])
    assert [stream.push(token) for token in parrot] == ["", "", "", "🦜"]
    assert not stream.stopped
    assert (stream.push(0x80), stream.stopped) == ("", False)
    assert (stream.push(0x41), stream.stopped) == ("", True)  # now no later byte completes it


SPACED = {metaspace: from_hugging_face(llama2_tokenizer(metaspace)) for metaspace in (False, True)}
"""Tokenizers that drop the space in front of a text, and have tokens for single bytes."""


@pytest.mark.parametrize("metaspace", [False, True])
@given(
    tokens=st.lists(st.integers(0, SPACED[False].vocab_size - 1) | st.sampled_from(range(3, 259)), max_size=40),
    text=st.text("the ca你🦜"),
)
@example(tokens=SPACED[False].encode(" cat")[2:].tolist(), text="the")
@example(tokens=SPACED[False].encode("你好")[2:].tolist(), text="你" * 9)
@example(tokens=[*SPACED[False].encode("你")[2:].tolist(), 231], text="")
@example(tokens=SPACED[False].encode("🦜" * 9 + "the cat sat")[2:].tolist(), text="the cat")
def test_pieces_are_what_the_tokens_add_to_the_text_of_the_prompt(metaspace, tokens, text):
    tokenizer = SPACED[metaspace]
    prompt = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer.decode, (), tokenizer.byte_tokens, prompt)
    pieces = [*(stream.push(token) for token in tokens), stream.finish()]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens)
    if whole.startswith(before):  # else bytes that are no character have spoiled the prompt's
        assert "".join(pieces) == whole[len(before) :]
    for end in range(len(tokens)):
        assert whole.endswith("".join(pieces[end + 1 :]))


def test_bytes_that_follow_one_another_come_together():
    tokenizer = SPACED[False]
    tokens = tokenizer.encode("a你好 cat")[2:].tolist()
    stream = TextStream(tokenizer.decode, (), tokenizer.byte_tokens, tokenizer.encode("the").tolist())
    pieces = [*(stream.push(token) for token in tokens), stream.finish()]
    assert [piece for piece in pieces if piece] == ["a", "你好 cat"]
    assert len(tokens) == 8


def test_a_stop_string_may_begin_with_the_space_of_the_first_token():
    tokenizer = SPACED[False]
    stream = TextStream(tokenizer.decode, [" cat"], prompt=tokenizer.encode("the").tolist())
    stream.push(int(tokenizer.encode("the cat")[-1]))
    assert stream.stopped
