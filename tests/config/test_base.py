"""Configs to JSON and back, and how they differ."""

import json

import pytest

from jaxlm.config import (
    ExperimentConfig,
    ModelConfig,
    presets,
)
from jaxlm.config.base import difference, from_dict, to_dict

SIZES = {"vocab_size": 11, "max_seq_len": 7}


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
