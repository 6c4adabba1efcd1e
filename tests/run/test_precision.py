"""The precision of matrix products that a run asks for."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlm.config import DataConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.run import session, training
from jaxlm.run.folder import read_config


def config(tmp_path, dtype="float32", **fields):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 60)
    tiny = preset("tiny")
    model = dataclasses.replace(tiny.model, num_layers=1, dtype=dtype)
    optim = dataclasses.replace(tiny.optim, warmup_steps=0)
    train = dataclasses.replace(tiny.train, steps=2, batch_size=2, **fields)
    return dataclasses.replace(
        tiny, model=model, optim=optim, train=train, data=DataConfig(path=str(tmp_path / "text.txt"))
    )


def lowered(tmp_path, monkeypatch, platform="cpu", **fields):
    """The program that a run trains by on a platform, and the state it starts from."""
    programs = []

    def loop(chunk, state, source, cfg, hooks):
        traced = chunk.trace(state, source(0), jnp.int32(1))
        programs.append((traced.lower(lowering_platforms=(platform,)).as_text(), state))
        return state._replace(step=jnp.int32(2))

    monkeypatch.setattr(training, "loop", loop)
    training.train(config(tmp_path, **fields), tmp_path / "run")
    return programs[0]


@pytest.mark.parametrize(
    ("name", "precision"), [("default", "DEFAULT"), ("float32", "HIGHEST"), ("tensorfloat32", "HIGH")]
)
def test_every_product_of_a_run_has_the_precision_asked_for(tmp_path, monkeypatch, name, precision):
    program, _ = lowered(tmp_path, monkeypatch, matmul_precision=name)
    found = re.findall(r"stablehlo.dot_general[^\n]*precision = \[(\w+), (\w+)\]", program)
    assert len(found) >= program.count("stablehlo.dot_general") > 10
    assert set(found) == {(precision, precision)}
    assert jax.config.jax_default_matmul_precision is None
    assert read_config(tmp_path / "run").train.matmul_precision == name


def test_a_run_goes_on_in_its_own_precision_only(tmp_path):
    asked = config(tmp_path, matmul_precision="float32")
    session.new_session(asked, tmp_path / "run")
    other = dataclasses.replace(asked, train=dataclasses.replace(asked.train, matmul_precision="default"))
    with pytest.raises(UserError, match=r"trained with train.matmul_precision = 'float32', not 'default'"):
        session.resumed_session(other, tmp_path / "run")


def test_bfloat16_is_one_field_and_leaves_parameters_and_moments_in_float32(tmp_path, monkeypatch):
    program, state = lowered(tmp_path, monkeypatch, platform="cuda", dtype="bfloat16")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim}
    assert kinds == {"float32"}
    products = re.findall(r"stablehlo.dot_general[^\n]*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", program)
    assert products.count(("bf16", "bf16")) > 0.8 * len(products) > 10
