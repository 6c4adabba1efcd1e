"""Runs and foreign models with NaN or infinity: a line, exit code 1, and JSON that is JSON."""

import json
import shutil

import numpy as np
import pytest
from foreign_folders import GPT2, weights, write
from support import command, snapshot

from jaxlm import strict_json
from jaxlm.cli import runs
from jaxlm.run import checkpoint
from jaxlm.run.folder import load_run
from jaxlm.training.step import TrainState


def of(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory):
    """The run of the tests with one parameter that is NaN."""
    whole, out = load_run(folder / "runs/tiny-1"), tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(folder / "runs/tiny-1", out)
    params = whole.params
    params["block_0"]["mlp"]["up"]["kernel"] = params["block_0"]["mlp"]["up"]["kernel"].at[1, 2].set(np.nan)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    checkpoint.save(out / "checkpoints", TrainState(params, (), np.int32(30)), None, keep=1)
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample"],
        ["sample", "--json", "--max-new-tokens", "5"],
        ["eval", "--json", "--task", "loss"],
        ["eval", "--json", "--task", "likelihood", "--limit", "2"],
        ["convert", "--to", "hf"],
        ["convert", "--to", "nanogpt"],
        ["convert", "--to", "torchref"],
    ],
    ids=" ".join,
)
def test_a_run_with_nan_is_refused_in_one_line(folder, broken, tmp_path, arguments):
    before = snapshot(broken)
    name, *more = arguments
    places = [broken, tmp_path / "out"] if name == "convert" else [broken]
    code, out, err = command(name, *places, *more)
    if "torch" in err:
        pytest.skip("there is no torch")
    assert code == 1, err
    assert err.startswith("jaxlm: error: ")
    assert err.count("\n") == 1
    assert out in ("", "\n")  # the prompt, where it was shown
    assert "nan" in err.lower()
    if arguments[0] == "sample":
        assert "row 0, new token 0: the model's logits are not finite; the parameter block_0/mlp/up/kernel" in err
    if arguments[0] == "convert":
        assert "the model cannot be written: block_0/mlp/up/kernel holds nan at [1, 2]" in err
    assert not (tmp_path / "out").exists()
    assert snapshot(broken) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_convert_names_the_tensor(tmp_path, value):
    tensors = weights(GPT2)
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name][3, 4] = value
    source = write(tmp_path / "gpt2", GPT2, tensors)
    code, out, err = command("convert", "--from", "hf", source, tmp_path / "run", "--json")
    assert (code, out) == (1, "")
    assert err == (
        f"jaxlm: error: {source / 'model.safetensors'}: {name} holds {value} at [3, 4]: convert a sound copy of the "
        "model\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_is_not_finite_is_null_in_json(monkeypatch, tmp_path):
    value = {"a": np.inf, "b": [1.5, float("nan"), (2, -np.inf)], "c": {"d": None}, "file": "\udce9"}
    text = strict_json.dumps(value, ensure_ascii=False)
    assert json.loads(text, parse_constant=of) == {
        "a": None,
        "b": [1.5, None, [2, None]],
        "c": {"d": None},
        "file": "\udce9",
    }
    text.encode()  # which a lone surrogate would not do
    summary = runs.RunSummary(
        run="r",
        preset="tiny",
        step=1,
        steps=2,
        val_loss=float("nan"),
        val_step=1,
        checkpoints=[],
        age_s=3.0,
        settings={},
    )
    monkeypatch.setattr(runs, "_summary", lambda path: summary)
    (tmp_path / "config.json").touch()
    code, out, _ = command("runs", tmp_path, "--json")
    assert code == 0
    assert json.loads(out, parse_constant=of)["runs"][0]["val_loss"] is None
