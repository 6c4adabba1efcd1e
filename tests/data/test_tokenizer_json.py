"""A tokenizer.json that contradicts itself is refused before the library panics or aborts the process."""

import base64
import copy

import foreign_folders
import foreign_tokenizers
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


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(kind, steps):
    return {"type": "Sequence", kind: steps}


def prepend(text):
    return {"type": "Prepend", "prepend": text}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TABLE = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"a" * 65 + b"\0b\0").decode()}


def template(pieces, ids=()):
    known = {"<s>": {"id": "<s>", "ids": list(ids), "tokens": ["<s>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": known}


TEXT, SPECIAL = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": sequence("normalizers", [replace("a", "a" * 1000)] * 3)}, "its normalizer"),
        ({"normalizer": sequence("normalizers", [replace("a", "aa")] * 24)}, "its normalizer"),
        ({"normalizer": sequence("normalizers", [sequence("normalizers", [replace("a", "aa")] * 7)])}, "normalizer"),
        ({"normalizer": sequence("normalizers", [replace("i", "İ"), {"type": "Lowercase"}] * 24)}, "its normalizer"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 64}}, "its normalizer"),
        ({"normalizer": prepend("a" * 10**6)}, "its normalizer"),
        ({"normalizer": TABLE}, "its normalizer"),
        ({"normalizer": replace("a", "a" * 9), "pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL] * 3)}, "norm"),
        ({"pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL] * 24)}, "pre_tokenizer can"),
        ({"decoder": sequence("decoders", [replace("a", "a" * 9)] * 2)}, "its decoder can"),
        ({"post_processor": sequence("processors", [template([TEXT, TEXT])] * 7)}, "its post_processor can"),
        ({"post_processor": template([SPECIAL, TEXT, SPECIAL], [1] * 600)}, "puts 1,200 tokens around a text"),
    ],
)
def test_what_makes_a_long_text_of_a_short_one_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        BPETokenizer.from_json(changed(lambda data: data.update(change)))


@pytest.mark.parametrize("name", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_what_is_put_at_each_part_of_a_word_is_short(name):
    with pytest.raises(UserError, match=f"{name} has more than 64 characters"):
        BPETokenizer.from_json(changed(lambda data: data["model"].update({name: "x" * 65})))


def test_usual_steps_are_read():
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}, replace(" ", "▁"), replace("``", '"')]
    usual = {"normalizer": sequence("normalizers", steps), "pre_tokenizer": BYTE_LEVEL}
    assert len(BPETokenizer.from_json(changed(lambda data: data.update(usual))).encode("abc"))
    for own in (foreign_tokenizers.llama2_tokenizer(), foreign_tokenizers.llama3_tokenizer()):
        assert len(BPETokenizer.from_json(own).encode("the cat"))


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
