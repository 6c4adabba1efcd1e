"""Folders of nanoGPT's tokens: their splits, their vocabulary, and what is refused."""

import hashlib
import json
import pickle

import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data.corpus import identity, learn_tokenizer, load_corpus, load_unsplit
from jaxlm.data.tokenizer import CharTokenizer, IdTokenizer
from jaxlm.errors import UserError
from jaxlm.training.evaluate import count_bytes

TRAIN, VAL = np.arange(600, dtype=np.uint16) % 7, np.arange(40, dtype=np.uint16) % 5
META = {"vocab_size": 7, "itos": {str(i): "\n abcde"[i] for i in range(7)}, "stoi": {}}


@pytest.fixture
def folder(tmp_path):
    TRAIN.tofile(tmp_path / "train.bin")
    VAL.tofile(tmp_path / "val.bin")
    (tmp_path / "meta.json").write_text(json.dumps(META))
    return tmp_path


def load(folder, given=None, **fields):
    return load_corpus(DataConfig(path=str(folder), **fields), 8, given)


def test_the_splits_and_the_characters_are_those_of_nanogpt(folder):
    corpus = load(folder)
    assert corpus.tokenizer.to_dict() == CharTokenizer("\n abcde").to_dict()
    np.testing.assert_array_equal(corpus.train.tokens[:], TRAIN)
    np.testing.assert_array_equal(corpus.val.tokens[:], VAL)
    assert corpus.train.is_mapped
    assert count_bytes(corpus.val, corpus.tokenizer) == 39
    cfg = DataConfig(path=str(folder))
    both = load_unsplit(cfg, 8, corpus.tokenizer).tokens
    np.testing.assert_array_equal(both[:], np.concatenate([TRAIN, VAL]))
    lines = "".join(
        f"{n}.bin {hashlib.sha256((folder / f'{n}.bin').read_bytes()).hexdigest()}\n" for n in ("train", "val")
    )
    assert identity(cfg) == corpus.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert learn_tokenizer(cfg).to_dict() == corpus.tokenizer.to_dict()


def test_without_a_vocabulary_tokens_are_ids_of_gpt2(folder):
    (folder / "meta.json").unlink()
    with pytest.warns(UserWarning, match=r"names no vocabulary: its tokens are ids below 50257 \(GPT-2's\)"):
        corpus = load(folder)
    assert corpus.tokenizer.to_dict() == {"type": "ids", "vocab_size": 50257}
    (folder / "meta.json").write_text('{"vocab_size": 12}')
    assert load(folder).tokenizer.to_dict() == {"type": "ids", "vocab_size": 12}
    assert load(folder, IdTokenizer(12)).tokenizer.vocab_size == 12
    (folder / "meta.json").unlink()
    (folder / "vocabulary.json").write_text(json.dumps(CharTokenizer("abcdefg").to_dict()))
    named = load(folder, tokenizer=f"{folder}/vocabulary.json")
    assert named.tokenizer.decode(named.train.tokens[:3]) == "abc"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_a_pickle_is_never_read_and_one_line_says_how_to_go_on(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        UserError, match=r"meta.pkl is a pickle, which jaxlm never reads, .* write a meta.json beside it"
    ):
        load(folder)
    assert load(folder, CharTokenizer("abcdefg")).tokenizer.vocab_size == 7


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "has vocab_size = None, not 1 to 65536"),
        ('{"vocab_size": true}', "has vocab_size = True"),
        ('{"vocab_size": 1000000}', "has vocab_size = 1000000"),
        ('{"vocab_size": 2, "itos": {"0": "b", "1": "a"}}', "has an itos that is not one character for each id"),
        ('{"vocab_size": 2, "itos": {"0": "a", "1": "bc"}}', "has an itos that is not one character for each id"),
        ('{"vocab_size": 2, "itos": ["a", "b"]}', "has an itos that is not one character for each id"),
        ('{"vocab_size": 1, "itos": {"0": "a", "1": "b"}}', "has an itos that is not one character for each id"),
    ],
)
def test_a_meta_that_is_none_is_named(folder, meta, words):
    (folder / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=f"meta.json {words}.*: write nanoGPT's meta.pkl as JSON"):
        load(folder)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="has tokens of another tokenizer than the given one"):
        load(folder, CharTokenizer("xy"))
    with pytest.raises(UserError, match=r"holds tokens already, and data.tokenizer = 'bpe' is for text: leave it out"):
        load(folder, tokenizer="bpe")
    with pytest.raises(UserError, match=r"is a folder of nanoGPT's tokens, which has splits of its own: give it alone"):
        load(folder, val_path=str(folder))
    with pytest.raises(UserError, match="data.pack = 'documents' needs documents"):
        load(folder, pack="documents")
    np.array([3, 9], np.uint16).tofile(folder / "val.bin")
    with pytest.raises(UserError, match=r"val.bin has the id 9, and the vocabulary ends with 6: give the tokenizer"):
        load(folder)
    (folder / "val.bin").write_bytes(b"odd")
    with pytest.raises(
        UserError, match=r"val.bin has an odd number of bytes \(3\): it is not nanoGPT's array of 16-bit ids"
    ):
        load(folder)
    (folder / "val.bin").write_bytes(b"")
    with pytest.raises(UserError, match="the validation split has 0 tokens"):
        load(folder).check_lengths()
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val.bin cannot be read .* give a folder that has train.bin and val.bin"):
        load(folder)
