"""Tokenizers as files that transformers reads: the same ids and the same text."""

import json
import random

import pytest
import transformers
from foreign_tokenizers import gemma_tokenizer, gpt2_tokenizer, llama2_tokenizer, llama3_tokenizer

from jaxlm.data.hugging_face import from_hugging_face, hugging_face_files
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer, IdTokenizer, TranscriptTokenizer, prompt_ids

CHARACTERS = "\n\t\r \u00a0\u2028abcXYZ.,'\"<>|{}\\/é\u0301ß你好🦜👩\u200d👩\ufe0f▁Ġ\x00\x1c\u0130"
ANY_TEXT = "the naïve café, 12345 don't\r\n\t  ▁Ġ\u00a0\u0301你🦜</s><s><|endoftext|>"
KINDS = {
    "char": CharTokenizer(CHARACTERS),
    "bpe": BPETokenizer.train(["the naïve café: the other thé there, don't 🦜 " * 20], 300),
    "transcript": TranscriptTokenizer(),
    "gpt2": from_hugging_face(gpt2_tokenizer()),
    "llama3": from_hugging_face(llama3_tokenizer()),
    "llama2": from_hugging_face(llama2_tokenizer()),
    "metaspace": from_hugging_face(llama2_tokenizer(metaspace=True)),
    "gemma": from_hugging_face(gemma_tokenizer()),
}
TEXTS = {"char": CHARACTERS, "transcript": "ABCXYZ' "}


def saved(tokenizer, folder, **options):
    for name, content in hugging_face_files(tokenizer, **options).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def texts_of(kind, count=60):
    draw = random.Random(0)
    return ["".join(draw.choices(TEXTS.get(kind, ANY_TEXT), k=draw.randint(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_transformers_gives_the_same_ids_and_the_same_text(tmp_path, kind, model_type):
    ours = KINDS[kind]
    if model_type is not None:  # as beside a model's weights
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = saved(ours, tmp_path, stop_tokens=(2,), max_length=77)
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 77)
    after = getattr(ours, "after", [])
    for text in texts_of(kind):
        ids = theirs(text).input_ids
        begun = prompt_ids(text, ours).tolist() if text or kind == "transcript" else ours.encode(text).tolist()
        assert ids == begun + after
        assert theirs.decode(ids) == ours.decode(ids)
        plain = theirs(text, add_special_tokens=False).input_ids
        if kind in ("char", "bpe", "transcript"):
            assert theirs.decode(plain) == text
    draw = random.Random(1)
    for _ in range(60):
        ids = draw.choices(range(ours.vocab_size), k=20)
        assert theirs.decode(ids) == ours.decode(ids)


def test_the_special_tokens_have_their_names(tmp_path):
    (tmp_path / "llama2").mkdir()
    (tmp_path / "transcript").mkdir()
    theirs = saved(KINDS["llama2"], tmp_path / "llama2", stop_tokens=(2,))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    theirs = saved(KINDS["transcript"], tmp_path / "transcript")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (28, 28, 29)
    assert theirs.decode(theirs("IT'S").input_ids, skip_special_tokens=True) == "IT'S"
    files = hugging_face_files(KINDS["llama2"], stop_tokens=(9,))  # of a token that is text, there is no name
    assert "eos_token" not in files["tokenizer_config.json"]


@pytest.mark.parametrize("kind", ["char", "transcript"])
def test_what_is_outside_the_vocabulary_is_refused_there_too(tmp_path, kind):
    with pytest.raises(Exception, match="UNK"):
        saved(KINDS[kind], tmp_path)("Ω")


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "llama3", "llama2", "metaspace"])
def test_what_is_written_is_read_again(kind):
    again = from_hugging_face(hugging_face_files(KINDS[kind])["tokenizer.json"])
    assert again.to_dict() == KINDS[kind].to_dict()


def test_ids_have_no_file():
    assert hugging_face_files(IdTokenizer(5)) == {}
