"""Steps that are rounded away."""

import dataclasses
import warnings

import jax.numpy as jnp
import pytest

from jaxlm.config.presets import preset
from jaxlm.optim.rounding import advise_float32, moved_share


def test_a_step_below_half_the_spacing_is_rounded_away():
    """0.02 lies between 2^-6 and 2^-5, where bfloat16 has a spacing of 2^-13."""
    values = jnp.array([0.02, 1.0, 0.0, -0.02], jnp.bfloat16)
    for rate, share in ((0.45 * 2**-13, 0.25), (0.55 * 2**-13, 0.75), (2.0**-7, 1.0), (0.0, 0.0)):
        assert moved_share({"w": values, "b": values}, rate) == share
        assert moved_share({"w": values.astype(jnp.float32)}, rate) == (rate > 0)


def config(param_dtype, rate, name="adamw"):
    tiny = preset("tiny")
    optim = dataclasses.replace(tiny.optim, name=name, learning_rate=rate)
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, param_dtype=param_dtype), optim=optim)


def test_float32_is_advised_where_bfloat16_is_too_coarse_for_the_rate():
    params = {"w": jnp.linspace(-0.06, 0.06, 999, dtype=jnp.bfloat16)}
    words = r"param_dtype = bfloat16: .* learning_rate = 1e-05 changes \d%|\d\d% of the parameters.*param-dtype float32"
    with pytest.warns(UserWarning, match=words):
        advise_float32(config("bfloat16", 1e-5), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advise_float32(config("bfloat16", 1e-3), params)
        advise_float32(config("float32", 1e-5), params)
