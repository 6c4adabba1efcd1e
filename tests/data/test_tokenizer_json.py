"""A tokenizer.json that contradicts itself is refused before the library panics or aborts the process."""

import copy

import foreign_folders
import pytest

from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.tokenizer import from_dict
from jaxlm.errors import UserError


def changed(change):
    data = copy.deepcopy(foreign_folders.word_tokenizer())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["model"]["vocab"].update(x=2**32 - 1), "the id 4294967295 for a token"),
        (lambda data: data["model"]["vocab"].update(x=-1), "the id -1"),
        (lambda data: data["model"]["vocab"].update(x="1"), "the id '1'"),
        (lambda data: data["model"]["vocab"].update(x=True), "the id True"),
        (lambda data: data["added_tokens"][0].update(id=2**31), "the id 2147483648"),
        (lambda data: data["added_tokens"][0].update(content=""), "added_tokens"),
        (lambda data: data["model"]["merges"].append(["a", "zz"]), "model.vocab lacks"),
        (lambda data: data["model"]["merges"].append("a b c"), "not a pair"),
        (lambda data: data["model"]["merges"].append(7), "not a pair"),
        (lambda data: data["model"].update(continuing_subword_prefix="##"), "model.vocab lacks"),
        (lambda data: data["model"].update(merges=None), "no list model.merges"),
        (lambda data: data["model"].update(vocab=[]), "no model.vocab"),
        (lambda data: data.update(model=None), "no model.vocab"),
    ],
)
def test_a_contradiction_is_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        BPETokenizer.from_json(changed(change))


def test_truncation_and_padding_are_left_out():
    """Both made the library panic: a stride beyond the length, a padding to a multiple of 2^62."""

    def change(data):
        data["truncation"]["stride"] = 2**31
        data["padding"]["pad_to_multiple_of"] = 2**62

    assert len(BPETokenizer.from_json(changed(change)).encode("abcde abc ab de")) > 3


def test_a_pattern_that_backtracks_without_end_is_refused_with_the_text():
    def change(data):
        pattern = {"Regex": "(a+)+$"}
        data["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}

    tokenizer = BPETokenizer.from_json(changed(change))
    assert len(tokenizer.encode("ab"))
    with pytest.raises(UserError, match="the tokenizer cannot encode this text .*retry-limit"):
        tokenizer.encode("a" * 40 + "c")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"type": "char", "chars": ""}, "chars are ''"),
        ({"type": "char", "chars": ["ab"]}, "chars are"),
        ({"type": "ids", "vocab_size": -1}, "vocab_size is -1"),
        ({"type": "ids", "vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"type": "ids", "vocab_size": True}, "vocab_size is True"),
    ],
)
def test_other_kinds_need_their_entry(data, words):
    with pytest.raises(UserError, match=words):
        from_dict(data)
