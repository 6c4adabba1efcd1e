import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    TranscriptTokenizer,
    from_dict,
    load,
    prompt_ids,
)
from jaxlm.errors import UserError

TEXT = "the cat sat on the mat; the dog sat on the log.\n" * 3


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def reloaded(tokenizer):
    return from_dict(json.loads(json.dumps(tokenizer.to_dict())))


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_characters_go_and_come_back(text):
    tokenizer = CharTokenizer(text)
    ids = reloaded(tokenizer).encode(text)
    assert ids.dtype == np.int32
    assert ids.max() < tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(ids) == text


def test_character_ids_are_in_code_point_order():
    assert CharTokenizer("cab").encode("abc").tolist() == [0, 1, 2]


def test_unknown_characters_are_named_with_the_first_place():
    with pytest.raises(ValueError, match=r"characters 'xz' are outside the vocabulary \(first 'z' at position 2\)"):
        CharTokenizer("abc").encode("abzcx")


@given(st.text(st.characters(codec="utf-8")))
def test_bpe_encodes_any_text(text):
    tokenizer = BPETokenizer.train([TEXT], 270)
    assert reloaded(tokenizer).decode(tokenizer.encode(text)) == text


def test_bpe_learns_merges_from_its_text_up_to_the_size():
    tokenizer = BPETokenizer.train([TEXT], 270)
    assert tokenizer.vocab_size == 270
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("xyz")) == 3
    assert BPETokenizer.train(["aaaa"], 1000).vocab_size < 300


def test_bpe_takes_what_looks_like_a_special_token_as_text():
    tokenizer = BPETokenizer.train([TEXT], 270)
    assert len(tokenizer.encode("<|endoftext|>")) == 13


@given(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ' "))
def test_transcripts_go_and_come_back(text):
    tokenizer = reloaded(TranscriptTokenizer())
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


def test_transcript_ids_are_letters_apostrophe_space_eos_pad():
    tokenizer = TranscriptTokenizer()
    assert tokenizer.encode("AZ' ").tolist() == [0, 25, 26, 27]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.vocab_size) == (28, 29, 30)
    assert tokenizer.decode(range(24, 30)) == "YZ' <eos><pad>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ABÉ!", "characters '!É' are outside the vocabulary (first 'É' at position 2)"),
        ("<eos>", "(first '<' at position 0)"),
        ("A1", "characters '1' are outside"),
    ],
)
def test_what_no_transcript_has_is_named_with_the_first_place(text, message):
    with pytest.raises(ValueError, match="use only") as error:
        TranscriptTokenizer().encode(text)
    assert message in str(error.value)
    assert ("upper case" in str(error.value)) == (text == "<eos>")


def test_only_transcripts_have_an_end_and_padding():
    for tokenizer in (CharTokenizer("ab"), BPETokenizer.train([TEXT], 260)):
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.eos_token is tokenizer.pad_token is None
    assert isinstance(TranscriptTokenizer(), Tokenizer)


def test_bytes_of_tokens_are_those_of_the_text_they_spell():
    text = "zwölf € 中 😀 the cat\n" * 3
    for tokenizer in (CharTokenizer(text), BPETokenizer.train([TEXT], 300)):
        token_bytes = tokenizer.token_bytes()
        assert token_bytes.shape == (tokenizer.vocab_size,)
        assert token_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    tokenizer = TranscriptTokenizer()
    assert tokenizer.token_bytes()[[*tokenizer.encode("IT'S LATE"), 28, 29]].tolist() == [1] * 9 + [0, 0]
    assert IdTokenizer(12).token_bytes() is None


def test_bytes_of_special_tokens_and_of_ids_without_a_token():
    data = json.loads(BPETokenizer.train([TEXT], 260)._tokenizer.to_str())
    data["model"]["vocab"] |= {"<|é|>": 262}
    data["added_tokens"] = [{**ADDED, "id": 262, "content": "<|é|>"}]
    tokenizer = from_hugging_face(data)
    assert tokenizer.vocab_size == 263
    assert tokenizer.token_bytes()[260:].tolist() == [0, 0, 6]  # é takes two bytes


def test_ids_are_their_own_text():
    made = IdTokenizer(12)
    assert isinstance(made, Tokenizer)
    assert made.eos_token is made.pad_token is None
    assert made.encode("3  0\n11 007").tolist() == [3, 0, 11, 7]
    assert made.encode("3 1").dtype == np.int32
    assert "3 1" + made.decode(np.array([11, 0])) == "3 1 11 0"
    assert from_dict(json.loads(json.dumps(made.to_dict()))).vocab_size == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 12", "'12' is outside the vocabulary: this tokenizer reads ids from 0 to 11"),
        ("1" * 5000, "is outside the vocabulary"),
        ("1 -2", "'-2' is not a token id"),
        ("1,2", "'1,2' is not a token id"),
        ("²", "'²' is not a token id"),
    ],
)
def test_what_is_no_id_is_named(text, message):
    with pytest.raises(UserError) as error:
        IdTokenizer(12).encode(text)
    assert message in str(error.value)


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(UserError, match="prompt ' ' has no token"):
        prompt_ids(" ", IdTokenizer(12))


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"type": "char", "chars": null}', '{"type": "bpe", "tokenizer": {}}']
)
def test_a_file_without_a_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json (does not hold a|cannot be read)"):
        load(tmp_path / "tokenizer.json")


def test_an_unknown_type_is_named():
    with pytest.raises(ValueError, match="tokenizer type 'word' is unknown"):
        from_dict({"type": "word"})
