"""Requests: the prompts as they are used, and what is refused in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CFG, KEY, PROMPT, sampled

from jaxlm.config import SamplingParams
from jaxlm.decode.request import check_prompts, make_request, request_from
from jaxlm.errors import UserError


def unchecked(function):
    """The function without jaxtyping's type checker, as a user has it."""
    return getattr(function, "__wrapped__", function)


def test_prompts_lose_the_padding_that_no_row_needs():
    ids = np.array([[1, 2, 3, 9], [4, 9, 99, -1]])
    prompts = check_prompts(11, ids, [3, 1], num_samples=2)
    assert prompts.ids.tolist() == [[1, 2, 3], [4, 0, 0]]  # padding may hold anything
    assert prompts.ids.dtype == np.int32
    assert (prompts.rows, prompts.longest) == (4, 3)
    assert check_prompts(11, ids[:1]).lengths.tolist() == [4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": jnp.zeros((2, 0), jnp.int32)}, r"prompt has shape \(2, 0\)"),
        ({"prompt": jnp.array([[0, 11]])}, "ids 0 to 11: the vocabulary has 0 to 10"),
        ({"prompt": jnp.array([[0, -1]])}, "ids -1 to 0: the vocabulary has 0 to 10"),
        ({"prompt_lengths": [5, 6]}, r"prompt_lengths = \[5, 6\]: each must be 1 to the prompt's width 5"),
        ({"prompt_lengths": [0, 5]}, r"prompt_lengths = \[0, 5\]"),
        ({"prompt_lengths": [5]}, r"prompt_lengths = \[5\]: give one integer for each of the 2 prompts"),
        ({"num_samples": 0}, "num_samples = 0: give a whole number of at least 1"),
        ({"capacity": 0}, "capacity = 0: give a whole number of at least 1"),
        ({"key": jax.random.split(KEY, 3)}, r"key has shape \(3,\): give one key, or one for each of the 2 rows"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(UserError, match=words):
        sampled(change.pop("prompt", PROMPT), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": jax.random.PRNGKey(0)}, r"key has type uint32: give jax.random.key\(seed\)"),
        ({"key": 0}, "key has type int: give jax.random.key"),
        ({"on_overflow": "roll"}, "on_overflow = 'roll': give 'continue' or 'error'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(change, words):
    with pytest.raises(UserError, match=words):
        unchecked(make_request)(CFG, PROMPT, SamplingParams(max_new_tokens=1), **{"key": KEY, **change})


def test_prompts_of_the_wrong_type_are_named():
    with pytest.raises(UserError, match="prompt has type float32: give integer token ids"):
        unchecked(check_prompts)(11, np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match="num_samples = 2.0: give a whole number"):
        unchecked(check_prompts)(11, PROMPT, num_samples=2.0)


def test_array_scalars_are_numbers_and_arrays_are_several_ids():
    def asked(**sampling):
        request = request_from(CFG, PROMPT, key=KEY, **sampling)
        return request.max_new_tokens, request.prompts.num_samples, request.plan, request.flags, request.values

    arrays = {
        "max_new_tokens": jnp.int32(4),
        "num_samples": np.int64(2),
        "capacity": jnp.int32(9),
        "top_k": np.array(3),
    }
    arrays |= {"temperature": jnp.float32(0.5), "top_p": np.float32(0.5), "repetition_penalty": jnp.float32(2)}
    ids = {"forbidden_tokens": jnp.array([1, 2]), "stop_token": np.array([4, 2])}
    numbers = {"max_new_tokens": 4, "num_samples": 2, "capacity": 9, "top_k": 3, "temperature": 0.5, "top_p": 0.5}
    numbers |= {"repetition_penalty": 2.0, "forbidden_tokens": [2, 1], "stop_token": {2, 4}}
    first, second = asked(**arrays, **ids), asked(**numbers)
    assert first[:4] == second[:4]
    jax.tree.map(np.testing.assert_array_equal, first[4], second[4])
    out = sampled(PROMPT, temperature=jnp.float32(0.5), max_new_tokens=jnp.int32(4), forbidden_tokens=jnp.array([1]))
    assert out.tokens.shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": None}, "temperature = None has the wrong type: give a number$"),
        ({"temperature": np.ones(2)}, r"temperature = \(1.0, 1.0\) has the wrong type: give a number"),
        ({"forbidden_tokens": None}, "forbidden_tokens = None has the wrong type: give whole numbers$"),
        ({"forbidden_tokens": "ab"}, "forbidden_tokens = 'ab' has the wrong type"),
        ({"forbidden_tokens": np.ones(2)}, "forbidden_tokens = .* has the wrong type"),
        ({"stop_token": 2.0}, "stop_token = 2.0 has the wrong type"),
        ({"top_k": jnp.float32(2)}, "top_k = 2.0 has the wrong type: give a whole number or None$"),
    ],
)
def test_options_of_the_wrong_type_are_named(change, words):
    with pytest.raises(UserError, match=words):
        request_from(CFG, PROMPT, key=KEY, max_new_tokens=3, **change)


def test_options_of_sampling_are_those_of_sampling_params():
    request = request_from(CFG, PROMPT, key=KEY, max_new_tokens=3, top_k=3, forbidden_tokens=[1, 2], stop_token=[4, 2])
    assert request.max_new_tokens == 3
    assert (request.flags.top_k_ceiling, request.flags.forbidden) == (4, True)
    assert np.flatnonzero(request.values.stops).tolist() == [2, 4]
    assert np.flatnonzero(request.values.forbidden).tolist() == [1, 2]
    with pytest.raises(TypeError, match="top_q"):
        request_from(CFG, PROMPT, key=KEY, max_new_tokens=3, top_q=0.5)
    with pytest.raises(UserError, match=r"seed = 3 is for the command: give key=jax.random.key\(3\)"):
        request_from(CFG, PROMPT, key=KEY, max_new_tokens=3, seed=3)
