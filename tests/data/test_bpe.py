"""Byte-pair encodings: those trained here, and those of other models, whole and in blocks."""

import json
import random

import numpy as np
import pytest
import tokenizers
from foreign_tokenizers import BYTES, gemma_tokenizer, gpt2_tokenizer, llama2_tokenizer, llama3_tokenizer

from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import from_dict

PIECES = [
    "the ",
    "cat",
    " ",
    "\n",
    ".\n\n",
    "naïve",
    " café",
    "你好",
    "🦜",
    "   ",
    "</s>",
    "<|endoftext|>",
    "log",
    "12345",
    "'s",
]
TEXT = "".join(random.Random(0).choices(PIECES, k=2000))
KINDS = {
    "gpt2": gpt2_tokenizer(),
    "llama3": llama3_tokenizer(),
    "llama2": llama2_tokenizer(),
    "metaspace": llama2_tokenizer(metaspace=True),
    "gemma": gemma_tokenizer(),
}
ENDS = {"gpt2": ([], []), "llama3": ([1], []), "llama2": ([1], [2]), "metaspace": ([1], [2]), "gemma": ([1], [])}


def reference(data, text, special_tokens, around=True):
    """What the tokenizers library itself gives for the whole text."""
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.encode_special_tokens = special_tokens == "text"
    return library.encode(text, add_special_tokens=around).ids


def in_blocks(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("special_tokens", ["id", "text"])
@pytest.mark.parametrize("size", [1, 7, 400, 1 << 24])
def test_ids_do_not_depend_on_the_blocks(monkeypatch, kind, special_tokens, size):
    monkeypatch.setattr("jaxlm.data.bpe.MARGIN", 40)
    tokenizer = from_hugging_face(KINDS[kind])
    parts = list(tokenizer.encode_blocks(in_blocks(TEXT, size), special_tokens))
    assert np.concatenate(parts).tolist() == reference(KINDS[kind], TEXT, special_tokens)
    assert {part.dtype for part in parts} == {np.dtype(np.int32)}
    assert (len(parts) > 10) == (size <= 400)  # it is not kept back until the end


@pytest.mark.parametrize("text", ["", "a", " " * 3000, "a" * 3000, "你" * 700, "ab" * 1500 + " "])
@pytest.mark.parametrize("kind", list(KINDS))
def test_long_words_and_short_texts_in_blocks(monkeypatch, kind, text):
    monkeypatch.setattr("jaxlm.data.bpe.MARGIN", 40)
    parts = from_hugging_face(KINDS[kind]).encode_blocks(in_blocks(text, 50))
    assert np.concatenate(list(parts)).tolist() == reference(KINDS[kind], text, "text")


def test_digits_in_groups_of_three_keep_their_groups_in_blocks(monkeypatch):
    """Where a long number is cut in two, the groups behind would begin elsewhere: there is no sound cut in it."""
    monkeypatch.setattr("jaxlm.data.bpe.MARGIN", 40)
    draw = random.Random(0)
    data = llama3_tokenizer(" ".join(f"{draw.randrange(1000):03}" for _ in range(4000)), size=400)
    text = " ".join("".join(draw.choices("0123456789", k=draw.choice([5, 500]))) for _ in range(40))
    parts = from_hugging_face(data).encode_blocks(in_blocks(text, 50))
    assert np.concatenate(list(parts)).tolist() == reference(data, text, "text")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_prompt_has_the_beginning_of_a_text_and_not_its_end(kind):
    tokenizer = from_hugging_face(KINDS[kind])
    begin, end = ENDS[kind]
    for text in ("the cat", "café 🦜\n", ""):
        whole = reference(KINDS[kind], text, "id")
        assert whole == begin + reference(KINDS[kind], text, "id", around=False) + end
        assert tokenizer.encode(text).tolist() == whole[: len(whole) - len(end)]


@pytest.mark.parametrize(("kind", "spelled", "token"), [("gpt2", "<|endoftext|>", 0), ("llama2", "</s>", 2)])
def test_a_special_token_in_a_text_is_one_id_or_text(kind, spelled, token):
    tokenizer = from_hugging_face(KINDS[kind])
    begin = len(ENDS[kind][0])
    assert tokenizer.encode(spelled)[begin:].tolist() == [token]
    as_text = tokenizer.encode(spelled, "text")[begin:]
    assert token not in as_text
    assert len(as_text) >= 3
    assert tokenizer.decode(as_text) == spelled
    assert tokenizer.encode(spelled)[begin:].tolist() == [token]  # the choice is that of one call
    literal = np.concatenate(list(tokenizer.encode_blocks([spelled])))  # by default, as corpora are read
    assert literal[begin : begin + len(as_text)].tolist() == as_text.tolist()


@pytest.mark.parametrize("special_tokens", ["id", "text"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_bytes_of_targets_are_those_of_the_text(kind, special_tokens):
    tokenizer = from_hugging_face(KINDS[kind])
    text = TEXT.lstrip().replace("</s></s>", "</s>").removesuffix("</s>") + "."
    ids = np.concatenate(list(tokenizer.encode_blocks([text], special_tokens)))
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    first = 0 if ENDS[kind][0] else counts[ids[0]]  # without <s>, the first token of the text is no target
    assert counts[ids[1:]].sum() - tokenizer.added_bytes == len(text.encode()) - first


def test_text_that_may_be_unknown_has_no_count_of_bytes():
    data = llama2_tokenizer()
    data["model"]["byte_fallback"] = False
    data["decoder"]["decoders"] = [step for step in data["decoder"]["decoders"] if step["type"] != "ByteFallback"]
    tokenizer = from_hugging_face(data)
    assert tokenizer.byte_tokens == frozenset()
    assert tokenizer.decode(tokenizer.encode("你")) == "<s> <unk>"
    assert tokenizer.token_bytes() is None
    assert tokenizer.added_bytes == 0


def test_bytes_are_tokens_where_the_decoder_reads_them():
    tokenizer = from_hugging_face(KINDS["llama2"])
    assert tokenizer.byte_tokens == set(range(3, 259))
    assert [tokenizer._tokenizer.id_to_token(i) for i in sorted(tokenizer.byte_tokens)] == BYTES
    assert from_hugging_face(KINDS["gpt2"]).byte_tokens == frozenset()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_foreign_tokenizer_goes_and_comes_back(kind):
    tokenizer = from_hugging_face(KINDS[kind])
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.before, again.after) == ENDS[kind] == (tokenizer.before, tokenizer.after)
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("size", [1, 3, 50])
def test_what_is_learned_does_not_depend_on_the_blocks(size):
    whole = BPETokenizer.train([TEXT], 290)
    assert BPETokenizer.train(in_blocks(TEXT, size), 290).to_dict() == whole.to_dict()
