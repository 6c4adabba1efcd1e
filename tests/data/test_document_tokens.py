"""The tokens of documents: what stands around a text, where it may be cut, the bytes it has."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from foreign_tokenizers import gpt2_tokenizer, llama2_tokenizer, llama3_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.data import document_tokens, documents
from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.document_tokens import cuts_at_spaces, document_bytes, encode_document, special_ids
from jaxlm.data.documents import Source
from jaxlm.data.hugging_face import from_hugging_face

SPACES = "ab   1\n\n\nb    a \n \n ab.  b\n\n  1"
LEARNED = BPETokenizer.train_on_documents(["the cat sat on the mat;\n\n the dog  sat\n", "naïve café", SPACES] * 9, 320)


def test_a_learned_tokenizer_has_an_end_of_text_that_no_text_becomes():
    assert special_ids(LEARNED) == {"<|endoftext|>": 0}
    assert LEARNED.vocab_size <= 320
    text = "cat<|endoftext|>dog"
    ids = encode_document(LEARNED, text, 0).tolist()
    assert (ids.count(0), ids[-1]) == (1, 0)
    assert LEARNED.decode(ids[:-1]) == text
    assert BPETokenizer.from_json(LEARNED.to_dict()["tokenizer"]).to_dict() == LEARNED.to_dict()


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(LEARNED, True), (gpt2_tokenizer(), True), (llama3_tokenizer(), False), (llama2_tokenizer(), False)],
    ids=["learned", "gpt2", "llama3", "llama2"],
)
def test_which_tokenizers_may_be_cut(tokenizer, expected):
    assert (
        cuts_at_spaces(tokenizer if isinstance(tokenizer, BPETokenizer) else from_hugging_face(tokenizer)) == expected
    )


@example(text="ab    ab\n \n ab   1\n\n\nb    a")
@given(text=st.text(st.sampled_from("ab1' \n\t.é你\u00a0\u2028\x1c\r"), max_size=60))
def test_pieces_have_the_tokens_of_the_whole(text):
    source = Source("a.txt", Path("a.txt"), 0, 0)
    old, documents.PIECE = documents.PIECE, 3
    try:
        pieces = list(documents._cut(iter([text]), True, source, 0))
    finally:
        documents.PIECE = old
    parts = [encode_document(LEARNED, piece, 0 if is_last else None) for piece, is_last in pieces]
    np.testing.assert_array_equal(np.concatenate(parts), encode_document(LEARNED, text, 0))


@pytest.mark.parametrize("at_once", [100, 1 << 18])
def test_what_a_tokenizer_puts_around_a_text_stands_there_once(monkeypatch, at_once):
    monkeypatch.setattr(document_tokens, "ENCODED_AT_ONCE", at_once)
    monkeypatch.setattr("jaxlm.data.bpe.MARGIN", 20)
    data, text = llama2_tokenizer(), "the cat</s> sat on the mat " * 20
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.encode_special_tokens = True
    own = library.encode(text).ids  # <s> text </s>
    assert (own[0], own[-1], own.count(2)) == (1, 2, 1)
    tokenizer = from_hugging_face(data)
    assert encode_document(tokenizer, text, 2).tolist() == own
    assert encode_document(tokenizer, text, 0).tolist() == [*own, 0]
    assert encode_document(tokenizer, text, 1).tolist() == [*own[1:], 1]


@pytest.mark.parametrize("data", [gpt2_tokenizer(), llama2_tokenizer(), llama2_tokenizer(metaspace=True)])
def test_bytes_of_documents_are_those_of_their_texts(data):
    tokenizer, texts = from_hugging_face(data), ["the cat", "naïve <s> café", "on</s>\n"]
    end = max(special_ids(tokenizer).values())
    tokens = np.concatenate([encode_document(tokenizer, text, end) for text in texts])
    assert document_bytes(tokenizer, end)[tokens].sum() == len("".join(texts).encode())
