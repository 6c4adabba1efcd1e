"""The subsets of AdamSN."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import compiled, numbers, trajectory
from tolerances import FLOAT32, assert_close

from jaxlm.errors import UserError
from jaxlm.optim import ParamKind, adamsn, scale_by_adam, scale_by_adamsn, state_bytes

MATRIX = ParamKind("linear", (-2,), (-1,))


@pytest.mark.parametrize(("shape", "kept"), [((3, 5), (1, 5)), ((5, 3), (5, 1)), ((3, 3), (1, 3))])
def test_auto_keeps_a_number_for_each_of_the_longer_side(shape, kept):
    state = scale_by_adamsn(subset="auto").init({"kernel": jnp.ones(shape)})
    assert state.nu["kernel"].shape == kept


@pytest.mark.parametrize(("shape", "kept"), [((3, 5), (3, 1)), ((5, 3), (1, 3)), ((4, 4), (4, 1)), ((5, 1), (1, 1))])
def test_smaller_keeps_a_number_for_each_of_the_shorter_side(shape, kept):
    """Kernels (inputs, outputs); a square one keeps a number for each input."""
    tx = scale_by_adamsn(subset="smaller")
    params = {"kernel": jnp.ones(shape)}
    assert tx.init(params).nu["kernel"].shape == kept
    assert state_bytes(tx, params) == 4 * (math.prod(shape) + min(shape) + 1)  # first moment, second, counter


@pytest.mark.parametrize(("subset", "axis"), [("per_output", 0), ("per_input", 1)])
def test_subsets_of_a_size_are_matrices_of_their_own(subset, axis):
    params, grads = {"kernel": numbers(0, shapes=(6, 4))}, {"kernel": numbers(1, 2, shapes=(6, 4))}

    def run(tx):
        return trajectory(tx, params, grads)[2]["kernel"]

    def cut(tx):
        trees = [
            dict(enumerate(jnp.split(tree["kernel"], tree["kernel"].shape[axis - 2] // 2, axis - 2)))
            for tree in (params, grads)
        ]
        parts = trajectory(tx, *trees)[2]
        return jnp.concatenate([parts[i] for i in range(len(parts))], axis - 2)

    pairs, whole, single, adam = compiled(
        lambda: (
            run(scale_by_adamsn(subset=subset, subset_size=2)),
            cut(scale_by_adamsn(subset=subset, kinds=dict.fromkeys(range(3), MATRIX))),
            run(scale_by_adamsn(subset=subset, subset_size=1)),
            run(scale_by_adam()),
        )
    )()
    assert_close(pairs, whole, FLOAT32)
    assert_close(single, adam, FLOAT32)
    assert np.abs(pairs - adam).max() > 0.1


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"subset_size": 2}, (3, 5), r"subset_size = 2 does not divide the \[3\] of kernel: give a divisor or None"),
        ({"subset_size": 3, "subset": "per_input"}, (3, 5), r"does not divide the \[5\] of kernel"),
        ({"subset_size": 2}, (2, 2, 5), r"does not divide the \[2, 2\] of kernel"),
        ({"subset_size": 0}, (3, 5), "subset_size = 0 is not a size: give at least 1"),
    ],
)
def test_subset_sizes_that_do_not_divide_are_refused(options, shape, message):
    with pytest.raises(UserError, match=message):
        adamsn(0.1, **options).init({"kernel": jnp.ones(shape)})
