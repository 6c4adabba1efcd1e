"""A tokenizer named by its file: of a run, of Hugging Face, or in their folders."""

import json

import pytest
from foreign_tokenizers import llama2_tokenizer

from jaxlm.config import DataConfig
from jaxlm.data.corpus import identity, learn_tokenizer, load_corpus, load_unsplit, resolved
from jaxlm.data.hugging_face import from_hugging_face, hugging_face_files
from jaxlm.data.tokenizer import CharTokenizer, IdTokenizer, TranscriptTokenizer
from jaxlm.data.tokenizer_file import kind, read_tokenizer_file
from jaxlm.errors import UserError

LETTERS = CharTokenizer("abc \n")


@pytest.mark.parametrize(
    "content", [LETTERS.to_dict(), hugging_face_files(LETTERS)["tokenizer.json"]], ids=["jaxlm", "hf"]
)
def test_a_file_or_its_folder_gives_the_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert read_tokenizer_file(path).to_dict() == LETTERS.to_dict()


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"type": "char"}', '{"type": "x"}', '{"model": 3}'])
def test_what_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"a.json (cannot be read|is not a tokenizer that jaxlm can read) \(.*\): give"):
        read_tokenizer_file(path)


def test_data_are_read_with_the_tokenizer_of_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama2_tokenizer()))
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 9)
    foreign = from_hugging_face(llama2_tokenizer())
    cfg = DataConfig(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer.json"))
    corpus, plain = load_corpus(cfg, 5), load_corpus(DataConfig(path=cfg.path, tokenizer="bpe"), 5, foreign)
    assert corpus.tokenizer.to_dict() == foreign.to_dict() == learn_tokenizer(cfg).to_dict()
    assert corpus.train.tokens.tolist() == plain.train.tokens.tolist()
    assert identity(cfg) == plain.sha256
    found, tokenizer = resolved(cfg)
    assert (found.tokenizer, tokenizer.to_dict()) == ("bpe", foreign.to_dict())
    assert resolved(cfg, LETTERS)[1] is LETTERS  # that of a run goes before
    assert load_unsplit(cfg, 5, foreign).tokens.tolist()[0] == foreign.before[0]
    with pytest.raises(UserError, match=r"bpe_vocab_size = 300 is for a BPE that is learned, and .* has 319 entries"):
        load_corpus(DataConfig(path=cfg.path, tokenizer=cfg.tokenizer, bpe_vocab_size=300), 5)


def test_kinds_are_values_of_the_config():
    kinds = [kind(tokenizer) for tokenizer in (LETTERS, TranscriptTokenizer(), IdTokenizer(3))]
    assert kinds == ["char", "transcript", "char"]
