"""The canary: right on this machine, and it says so when a program is wrong."""

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import canary


@pytest.fixture(scope="module")
def outcomes():
    return canary.run_programs()


def test_this_compiler_computes_right(outcomes):
    assert len(outcomes) > 20
    assert [outcome for outcome in outcomes if not outcome.right] == []


def test_every_program_has_a_name_of_its_own(outcomes):
    assert len({outcome.name for outcome in outcomes}) == len(outcomes)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda x: x.at[-1].set(0.0), 1.0),  # the reported fault: the last row is lost
        (lambda x: x.at[3].add(1e-4 * x.max()), 1e-4),
        (lambda x: jnp.full_like(x, jnp.nan), np.nan),
    ],
    ids=["a lost row", "a small difference", "not a number"],
)
def test_a_wrong_program_is_named_with_its_error(monkeypatch, damage, error):
    inputs = (np.arange(1, 6, dtype=np.float32),)
    programs = [
        canary.Program("right", lambda x: x * 2, lambda x: x * 2, inputs),
        canary.Program("wrong", lambda x: damage(x * 2), lambda x: x * 2, inputs),
    ]
    monkeypatch.setattr(canary, "_programs", lambda: programs)
    right, wrong = canary.run_programs()
    assert (right.name, right.right, right.error) == ("right", True, 0.0)
    assert (wrong.name, wrong.right) == ("wrong", False)
    np.testing.assert_allclose(wrong.error, error, rtol=1e-2)


def test_the_references_are_not_what_is_compiled():
    """Each program computes with JAX on one side and with NumPy in float64 on the other."""
    for program in canary._programs():
        wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in program.inputs]
        assert isinstance(program.reference(*wide), np.ndarray | np.float64)


def test_versions_known_to_be_wrong(monkeypatch):
    canary.warn_of_known_fault()  # says nothing: a warning would be an error here
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    with pytest.warns(UserWarning, match=r"jaxlib 0.10.2 computes wrong results on CPU \(jax-ml/jax#39103\): install"):
        canary.warn_of_known_fault()
