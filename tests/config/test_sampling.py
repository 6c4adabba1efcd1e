"""Options of sampling: what is refused, whose numbers are taken."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import SampleConfig, SamplingParams
from jaxlm.config.base import from_dict, to_dict
from jaxlm.errors import UserError


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is too small: give at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 has the wrong type: give a whole number$"),
        ({"temperature": -0.5}, "temperature = -0.5 is out of range: give 0 .greedy., or a finite number of at least"),
        ({"temperature": 1e-42}, "temperature = 1e-42 is out of range"),
        ({"temperature": float("nan")}, "temperature = nan is out of range"),
        ({"temperature": float("inf")}, "temperature = inf is out of range"),
        ({"temperature": "0.5"}, "temperature = '0.5' has the wrong type"),
        ({"temperature": None}, "temperature = None has the wrong type"),
        ({"top_k": 0}, "top_k = 0 is too small"),
        ({"top_k": 2.0}, "top_k = 2.0 has the wrong type"),
        ({"top_k": True}, "top_k = True has the wrong type"),
        ({"top_p": 1.5}, "top_p = 1.5 is out of range: give 0 < top_p <= 1"),
        ({"min_p": 0.0}, "min_p = 0.0 is out of range: give 0 < min_p <= 1"),
        ({"min_p": float("nan")}, "min_p = nan is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 is out of range"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf is out of range"),
        ({"forbidden_tokens": (3, -1)}, r"forbidden_tokens = \(3, -1\) holds a negative id"),
        ({"forbidden_tokens": ("a",)}, "forbidden_tokens = .* has the wrong type"),
        ({"stop_token": -1}, "stop_token = -1 is negative: give ids from 0 on"),
        ({"seed": -1}, "seed = -1 is out of range"),
        ({"seed": 2**31}, "seed = 2147483648 is out of range"),
    ],
)
def test_values_out_of_range_are_refused_here_and_in_a_run(change, words):
    for cls in (SamplingParams, SampleConfig):
        with pytest.raises(UserError, match=words):
            cls(**{"max_new_tokens": 5, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": ("a", "")}, "holds an empty text"),
        ({"stop": ("\udcff",)}, "holds a text that is not UTF-8"),
        ({"num_samples": 0}, "num_samples = 0 is too small"),
    ],
)
def test_a_run_has_options_of_its_own(change, words):
    with pytest.raises(UserError, match=words):
        SampleConfig(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop_token": 11}, "stop_token = 11: the vocabulary has 0 to 10"),
        ({"forbidden_tokens": (3, 12, 11)}, "forbidden_tokens holds 12: the vocabulary has 0 to 10"),
        ({"forbidden_tokens": tuple(range(11))}, "forbidden_tokens holds all 11 tokens: leave one"),
    ],
)
def test_token_ids_are_checked_against_a_vocabulary(change, words):
    params = SamplingParams(max_new_tokens=5, **change)
    params.check_vocabulary(20)
    with pytest.raises(UserError, match=words):
        params.check_vocabulary(11)


def test_numbers_of_numpy_and_jax_become_pythons():
    plain = SamplingParams(max_new_tokens=5, temperature=0.5, top_k=3, forbidden_tokens=(1, 2), stop_token=4)
    for integer, number in ((np.int64, np.float32), (np.int32, np.array), (jnp.int32, jnp.float32)):
        params = SamplingParams(
            max_new_tokens=integer(5),
            temperature=number(0.5),
            top_k=integer(3),
            forbidden_tokens=(integer(1), 2),
            stop_token=integer(4),
        )
        assert params == plain
        assert {type(value) for value in vars(params).values()} == {int, float, tuple, type(None)}
    with pytest.raises(UserError, match="has the wrong type"):
        SamplingParams(max_new_tokens=5, temperature=np.array([0.5, 0.7]))


def test_a_runs_options_are_flat_in_json_and_older_ones_still_open():
    stored = to_dict(SampleConfig(prompt="a", temperature=0.5, stop=("b",), forbidden_tokens=(3,)))
    assert (stored["prompt"], stored["temperature"], stored["max_new_tokens"]) == ("a", 0.5, 500)
    assert to_dict(from_dict(SampleConfig, stored)) == stored
    del stored["stop_token"]
    assert from_dict(SampleConfig, stored) == SampleConfig(
        prompt="a", temperature=0.5, stop=("b",), forbidden_tokens=(3,)
    )
    assert (SampleConfig().temperature, SamplingParams(max_new_tokens=1).temperature) == (0.8, 1.0)
