"""Refusals that the functions of decode share."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decode.checks import check_count, check_ids
from jaxlm.errors import UserError


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None, np.float32(2), np.ones(1, int), jnp.int32(0)])
def test_a_count_is_a_whole_number_from_1_on(value):
    numbers = 1, np.int64(3), np.array(3), jnp.int32(3)
    counts = [check_count("steps", number) for number in numbers]
    assert counts == [1, 3, 3, 3]
    assert {type(count) for count in counts} == {int}
    with pytest.raises(UserError, match=r"steps = .*: give a whole number of at least 1"):
        check_count("steps", value)


@pytest.mark.parametrize("ids", [[0, 11], [-1, 3]])
def test_ids_are_those_of_the_vocabulary(ids):
    check_ids("prompt", np.array([0, 10]), 11)
    with pytest.raises(UserError, match=r"prompt holds ids .*: the vocabulary has 0 to 10"):
        check_ids("prompt", np.array(ids), 11)
