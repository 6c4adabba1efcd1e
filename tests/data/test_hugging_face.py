"""Tokenizers that went out to Hugging Face's files come back as they were."""

import json

import pytest

from jaxlm.data.hugging_face import from_hugging_face, hugging_face_files
from jaxlm.data.tokenizer import CharTokenizer, TranscriptTokenizer
from jaxlm.errors import UserError


@pytest.mark.parametrize("tokenizer", [CharTokenizer("hello\n\t é\u0301😀"), TranscriptTokenizer()])
def test_characters_come_back(tokenizer):
    data = json.loads(json.dumps(hugging_face_files(tokenizer)["tokenizer.json"]))
    back = from_hugging_face(data)
    assert type(back) is type(tokenizer)
    assert back.to_dict() == tokenizer.to_dict()


def test_other_tables_of_words_are_refused():
    data = hugging_face_files(CharTokenizer("abc"))["tokenizer.json"]
    for change in ({"decoder": None}, {"model": {**data["model"], "vocab": {"ab": 0, "c": 1}}}):
        with pytest.raises(UserError, match="its model is of type 'WordLevel', only 'BPE' is supported"):
            from_hugging_face({**data, **change})
