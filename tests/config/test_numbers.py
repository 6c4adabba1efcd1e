"""Numbers that do not fit into the 32 bits that they are computed in: refused by name, in every field."""

import dataclasses
import math

import pytest

from jaxlm.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from jaxlm.errors import UserError

NEEDED = {ModelConfig: {"vocab_size": 5, "max_seq_len": 7}}
CONFIGS = [ModelConfig, OptimConfig, DataConfig, TrainConfig, SampleConfig, MeshConfig]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_number_of_every_config_must_fit(cls):
    tried = 0
    for field in dataclasses.fields(cls):
        hint = str(field.type)
        if field.name == "schedule_steps" or "Literal" in hint:
            continue
        is_float, is_int = "float" in hint or "PerLayer" in hint, "int" in hint
        bad = (
            [math.inf, -math.inf, math.nan, 1e39, 10**400] if is_float else [2**31, -(2**31), 10**30] if is_int else []
        )
        for value in bad:
            tried += 1
            with pytest.raises(UserError, match=f"{field.name} = ") as error:
                cls(**{**NEEDED.get(cls, {}), field.name: value})
            assert "give" in str(error.value)
    assert tried >= 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eps": 0.0}, "eps = 0.0 is too small"),
        ({"eps": 1e-60}, "eps = 1e-60 is too small"),
        ({"eps": math.inf}, "eps = inf is out of range: give a finite number"),
        ({"weight_decay": math.inf}, "weight_decay = inf is out of range: give a finite number"),
        ({"clip_norm": 1e-60}, "clip_norm = 1e-60 is too small"),
        ({"max_nonfinite": 100_000_000_000}, "max_nonfinite = 100000000000 is out of range: give less than 2^31"),
        ({"schedule_steps": 2**31}, "schedule_steps = 2147483648 is out of range"),
        ({"schedule_steps": 0}, "schedule_steps = 0 is too small"),
    ],
)
def test_numbers_that_make_no_update_or_none_that_is_finite_are_refused(fields, words):
    with pytest.raises(UserError) as error:
        OptimConfig(**fields)
    assert words in str(error.value)


def test_numbers_within_float32_are_taken():
    assert OptimConfig(eps=1e-30, learning_rate=1e30).learning_rate == 1e30
    assert ModelConfig(vocab_size=5, max_seq_len=7, rope_theta=10_000_000_000, position="rope")
