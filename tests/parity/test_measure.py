"""`jaxlm.parity.measure`: when two results are the same, when one rounds too much, and when they differ."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parity.measure import Results, measure

TRUTH = np.random.default_rng(0).standard_normal((7, 11))
NAN = float("nan")
ULP = 2.0**-23 * np.abs(TRUTH).max()


def verdict(jax_off, torch_off=0.0, jax_float64_off=0.0, dtype="float32", **how):
    """The verdict on results that are off by so much everywhere; float64 ones as they are given."""
    exact = None if jax_float64_off is None else TRUTH + jax_float64_off
    draw = Results(TRUTH + jax_off, TRUTH + torch_off, exact, TRUTH)
    return measure("activation", "x", [draw], dtype, **how).verdict


@pytest.mark.parametrize(
    ("jax_off", "torch_off", "expected"),
    [
        (0, 0, "same"),
        (3.9 * ULP, 0, "same"),
        (4.1 * ULP, 0, "rounding"),
        (5.9 * ULP, ULP, "same"),
        (np.nan, 0, "rounding"),
    ],
)
def test_rounding_is_held_to_torchs(jax_off, torch_off, expected):
    assert verdict(jax_off, torch_off) == expected


def test_float64_decides_what_is_a_bug():
    size = np.abs(TRUTH).max()
    assert verdict(0, 0, 0.9e-10 * size) == "same"
    assert verdict(0, 0, 1.1e-10 * size) == "DIFFERS"
    assert verdict(100 * ULP, 0, 1.1e-10 * size) == "DIFFERS"
    assert verdict(100 * ULP, 0, 0.9e-10 * size) == "rounding"
    assert verdict(0, 0, np.nan) == "DIFFERS"


def test_bfloat16_is_held_to_a_quarter_of_its_unit():
    unit = 2.0**-7 * np.abs(TRUTH).max()
    assert verdict(0.24 * unit, dtype="bfloat16") == "same"
    assert verdict(0.26 * unit, dtype="bfloat16") == "rounding"
    assert verdict(0.5 * unit, 0.13 * unit, dtype="bfloat16") == "same"


def test_without_float64_from_jax_one_value_decides_too():
    assert verdict(3.9 * ULP, jax_float64_off=None) == "same"
    assert verdict(4.1 * ULP, jax_float64_off=None) == "DIFFERS"
    one = np.zeros_like(TRUTH)
    one[2, 3] = 1
    assert verdict(33 * ULP * one, jax_float64_off=None) == "same"
    assert verdict(65 * ULP * one, jax_float64_off=None) == "DIFFERS"
    assert verdict(2000 * ULP, 1500 * ULP, jax_float64_off=None) == "DIFFERS"  # torch's own is far off


def test_what_is_zero_in_theory_is_judged_by_its_kind():
    tiny = 1e-15 * TRUTH
    draw = Results(tiny.astype(np.float32), -tiny.astype(np.float32), tiny, -tiny)
    assert measure("gradient", "key/bias", [draw], "float32").verdict == "DIFFERS"
    assert measure("gradient", "key/bias", [draw], "float32", scale=1.0).verdict == "same"


def test_small_changes_are_judged_by_what_they_change():
    assert verdict(8 * ULP) == "rounding"
    assert verdict(8 * ULP, unit=3 * np.abs(TRUTH).max()) == "same"
    size = np.abs(TRUTH).max()
    assert verdict(0, 0, 8e-10 * size) == "DIFFERS"
    assert verdict(0, 0, 8e-10 * size, unit=1e6 * size) == "same"  # 4 units in the last place are 8.9e-10
    assert verdict(0, 0, 9e-10 * size, unit=1e6 * size) == "DIFFERS"


def test_other_shapes_and_types_differ():
    wide = measure("logits", "", [Results(TRUTH, TRUTH.astype(np.float32))], "float32")
    assert (wide.verdict, wide.name) == ("DIFFERS", " (7, 11) float64, not float32")
    assert measure("logits", "", [Results(TRUTH, TRUTH[:1])], "float64").verdict == "DIFFERS"
    tokens = Results(np.ones(3, np.int32), np.ones(3, np.int64))
    assert measure("decoding", "3 greedy tokens", [tokens], "float64").verdict == "same"


def test_draws_are_averaged():
    """A bad draw among four of the same is not one alone."""
    bad, good = Results(TRUTH + 6 * ULP, TRUTH, TRUTH, TRUTH), Results(TRUTH, TRUTH, TRUTH, TRUTH)
    assert measure("loss", "", [bad], jnp.float32).verdict == "rounding"
    assert measure("loss", "", [bad, good, good, good], jnp.float32).verdict == "same"
