"""Configs to JSON and back, and how they differ."""

import dataclasses
import json
from typing import Literal

import pytest

from jaxlm.config import (
    ExperimentConfig,
    ModelConfig,
    SamplingParams,
    presets,
)
from jaxlm.config.base import Validated, difference, from_dict, to_dict
from jaxlm.config.data import Paths
from jaxlm.errors import UserError

SIZES = {"vocab_size": 11, "max_seq_len": 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields(Validated):
    """Fields of types that are told in words."""

    pair: tuple[float, float] | None = None
    switch: bool | None = None
    kind: Literal["a", "b"] | None = None
    paths: Paths = None
    nested: SamplingParams | None = None


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_survives_json(name):
    config = presets.preset(name)
    assert config.preset == name
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"vocab_size": 5, "max_seq_len": 3, "num_layer": 2}, "no field num_layer"),
        ({"vocab_size": 5}, "needs max_seq_len"),
    ],
)
def test_json_with_a_surplus_or_missing_key_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        from_dict(ModelConfig, data)


def test_json_with_a_value_in_place_of_an_object_is_refused():
    with pytest.raises(ValueError, match="train = 3 is not an object"):
        from_dict(ExperimentConfig, {"preset": "tiny", "model": SIZES, "train": 3})


def test_difference_names_the_nested_field():
    ours, theirs = presets.preset("tiny"), presets.preset("tiny")
    assert difference(ours, theirs) == []
    other = from_dict(ExperimentConfig, {**to_dict(ours), "train": {**to_dict(ours.train), "steps": 7}})
    assert difference(other, theirs) == [("train.steps", 7, 500)]


@pytest.mark.parametrize(
    ("cls", "change", "words"),
    [
        (ModelConfig, {"num_heads": "four"}, "num_heads = 'four' has the wrong type: give a whole number"),
        (ModelConfig, {"window": "8"}, "window = '8' has the wrong type: give a whole number, whole numbers or None"),
        (SamplingParams, {"forbidden_tokens": 3}, "forbidden_tokens = 3 has the wrong type: give whole numbers"),
        (Fields, {"pair": 1.5}, "pair = 1.5 has the wrong type: give 2 numbers or None"),
        (Fields, {"switch": "on"}, "switch = 'on' has the wrong type: give True, False or None"),
        (Fields, {"kind": 3}, "kind = 3 has the wrong type: give 'a', 'b' or None"),
        (Fields, {"paths": 3}, "paths = 3 has the wrong type: give a text, texts or None"),
        (Fields, {"nested": 3}, "nested = 3 has the wrong type: give a SamplingParams or None"),
    ],
)
def test_types_are_told_in_english(cls, change, words):
    required = {ModelConfig: SIZES, SamplingParams: {"max_new_tokens": 3}, Fields: {}}
    with pytest.raises(UserError) as refusal:
        cls(**required[cls] | change)
    assert str(refusal.value) == words
