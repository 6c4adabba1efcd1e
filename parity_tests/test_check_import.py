"""`jaxlm parity --reference`: imported models against their own library's modules, and what is refused."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import family_models
import numpy as np
import pytest
import safetensors.torch  # noqa: F401  before family_models changes what torch.float32 is
import torch
import transformers
from foreign import gpt2, llama, save_nanogpt
from support import command, refused

from jaxlm import convert, parity
from jaxlm.convert.families.family import shapes
from jaxlm.errors import UserError
from jaxlm.parity import source
from jaxlm.parity.float64 import float64_throughout
from jaxlm.run.init_from import params_sha256

VARIANTS = [case for case in family_models.CASES if " " in case and case != "stablelm parallel"]
"""Families again with other options, which add no module but the norm that stablelm leaves out."""
MODEL_PY = Path(__file__).with_name("own_nanogpt.py")


@pytest.fixture
def gpt2_folder(tmp_path):
    gpt2(n_layer=1).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def llama_folder(tmp_path):
    return saved_llama(tmp_path / "llama")


@pytest.fixture
def nanogpt_folder(tmp_path):
    return saved_nanogpt(tmp_path / "nanogpt")


def saved_llama(folder, **changes):
    llama(num_hidden_layers=1, num_key_value_heads=1, **changes).save_pretrained(folder)
    return folder


def saved_nanogpt(folder, **options):
    folder.mkdir()
    activation = options.pop("activation_function", "gelu")
    save_nanogpt(gpt2(n_layer=1, activation_function=activation, n_inner=None), folder / "ckpt.pt", **options)
    shutil.copy(MODEL_PY, folder / "model.py")
    return folder


@contextlib.contextmanager
def imported_as(folder, reference="hf", **changes):
    """The source, with jaxlm's config changed as a wrong converter would."""
    opened = source.open_source(folder, reference)
    yield dataclasses.replace(opened, cfg=dataclasses.replace(opened.cfg, **changes))


def quantities(report):
    return list(dict.fromkeys(row.quantity for row in report.rows))


# What is the same


def test_the_command_compares_a_gpt2_with_transformers_and_writes_a_report(gpt2_folder, tmp_path):
    arguments = ("parity", "--reference", "hf", gpt2_folder, "--json", "--draws", 1, "--report", tmp_path / "proof")
    code, out, err = command(*arguments)
    assert code == 0, err
    proof = json.loads((tmp_path / "proof" / "report.json").read_text())
    weights = (gpt2_folder / "model.safetensors").read_bytes()
    assert proof["files_sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert proof["parameters_sha256"] == params_sha256(convert.from_hf(gpt2_folder)[1])
    assert (proof["reference"], proof["versions"]["jax"]) == ("transformers", proof["jax"])
    assert proof["rows"] == json.loads(out)["rows"]
    assert "block_0/attention" in (tmp_path / "proof" / "index.html").read_text()
    assert "proof has report.json and index.html already" in refused(*arguments)
    found = json.loads(out)
    assert found["passed"] is True
    assert found["transformers"] == transformers.__version__
    rows = {(row["quantity"], row["name"]): row for row in found["rows"]}
    for name in ("block_0/attention", "block_0/mlp/up", "block_0", "final_norm"):
        assert rows["activation", name]["float64_rel"] < 1e-12
    assert rows["logits", ""]["float64_rel"] < 1e-12
    assert rows["gradient", "block_0/attention/key/kernel"]["shape"] == [15, 15]
    assert ("decoding", "11 greedy tokens") in rows  # 23 places, 12 of the prompt
    assert "update" not in {row["quantity"] for row in found["rows"]}


@pytest.mark.slow
def test_a_llama_in_half_precision_is_compared_in_float32(tmp_path):
    model = llama(num_hidden_layers=1, tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    report = parity.check_import(tmp_path, draws=1)
    assert report.passed, report
    assert quantities(report) == ["activation", "logits", "loss", "gradient", "decoding"]
    assert report.worst("logits").float64_rel < 1e-12
    assert any(row.name == "64 greedy tokens" for row in report.rows)


def test_torch_files_under_a_wrapper_are_compared_too(tmp_path):
    theirs = llama(num_hidden_layers=1)
    theirs.config.save_pretrained(tmp_path)
    torch.save(
        {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "pytorch_model.bin"
    )
    assert parity.check_import(tmp_path, draws=1, parts=()).passed


def test_a_config_that_transformers_refuses_is_said_in_one_line(tmp_path):
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": "much"}))
    with pytest.raises(UserError, match="attention_dropout"):
        parity.check_import(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"initializer_range": "wide"}))
    code, _, err = command("parity", "--reference", "hf", tmp_path)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"jaxlm: error: transformers cannot load {tmp_path}: ")


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nanogpt_is_compared_with_its_own_model_py(tmp_path, bias):
    folder = saved_nanogpt(tmp_path / "nanogpt", bias=bias, prefix="_orig_mod.")
    code, out, err = command("parity", "--reference", "nanogpt", folder, "--draws", 1)
    assert code == 0, err
    assert f"importing {folder / 'model.py'}: its code runs" in err
    assert "number of parameters" not in out
    assert "block_0/attention" in out


@pytest.mark.slow
def test_a_window_that_the_source_has_not_is_named(llama_folder):
    with imported_as(llama_folder, window=5) as wrong:
        first = parity.check_import(wrong, parts=()).first
    assert (first.layer, first.verdict) == ("block_0/attention", "DIFFERS")
    assert any(cause.startswith("window = None where the config has 5") for cause in first.causes)


def test_what_transformers_computes_in_float32_is_float64_in_here(llama_folder):
    tokens = torch.arange(20)[None]

    def logits():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            llama_folder, dtype=torch.float64, attn_implementation="eager", local_files_only=True
        )
        with torch.no_grad():
            return model(tokens).logits

    narrow = logits()
    with float64_throughout():
        wide = logits()
    assert narrow.dtype == wide.dtype == torch.float64
    assert 1e-9 < (narrow - wide).abs().max() / wide.abs().max() < 1e-5
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(2).float().dtype == torch.float32


# What differs is named, with its cause


@pytest.mark.parametrize(
    ("changes", "layer", "cause"),
    [
        (
            {"rope_layout": "interleaved"},
            "block_0/attention",
            "rope_layout = 'half' where the config has 'interleaved'",
        ),
        pytest.param(
            {"rope_theta": 1e5},
            "block_0/attention",
            "rope_theta = 10000.0 where the config has 100000.0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"norm_eps": 1e-5},
            "block_0/attention_norm",
            "norm_eps = 1e-06 where the config has 1e-05",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"activation": "geglu"},
            "block_0/mlp",
            "activation = 'swiglu' where the config has 'geglu'",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["layout", "theta", "eps", "activation"],
)
def test_a_wrong_field_is_tried_and_named(llama_folder, changes, layer, cause):
    with imported_as(llama_folder, **changes) as wrong:
        report = parity.check_import(wrong, parts=())
    assert (report.first.layer, report.first.inputs_agree) == (layer, True)
    assert report.first.causes[0] == f"{cause} (tried: torchref then gives the source's values)"


def test_an_old_nanogpt_with_tanh_gelu_is_named(nanogpt_folder):
    text = (nanogpt_folder / "model.py").read_text().replace("nn.GELU()", 'nn.GELU(approximate="tanh")')
    (nanogpt_folder / "model.py").write_text(text)
    report = parity.check_import(nanogpt_folder, "nanogpt", parts=())
    assert report.first.layer == "block_0/mlp"
    assert report.first.causes[0].startswith("activation = 'gelu_tanh' where the config has 'gelu' (tried")


def test_a_wrong_weight_shows_in_its_layer_and_a_wrong_cache_in_decoding(gpt2_folder):
    opened = source.open_source(gpt2_folder)
    params = {**opened.params, "final_norm": {**opened.params["final_norm"]}}
    params["final_norm"]["bias"] = params["final_norm"]["bias"] + 1e-3
    report = parity.check_import(dataclasses.replace(opened, params=params), parts=())
    assert report.first.layer == "final_norm"
    continued = source.TransformersNetwork._continued
    with mock.patch.object(
        source.TransformersNetwork, "_continued", lambda self, tokens, _: continued(self, tokens, None)
    ):
        report = parity.check_import(opened, parts=("decoding",))
    assert report.first.quantity == "decoding"
    assert "position" in report.first.where


def test_a_gradient_in_the_wrong_layout_is_caught(gpt2_folder):
    opened = source.open_source(gpt2_folder)
    turned = [
        entry._replace(paths=(entry.paths[1], entry.paths[0], *entry.paths[2:])) if len(entry.paths) > 1 else entry
        for entry in opened.entries
    ]
    report = parity.check_import(dataclasses.replace(opened, entries=turned), parts=("gradients",))
    assert report.first.quantity == "gradient"
    assert "attention" in report.first.layer


# Families


@functools.cache
def family_source(case):
    """A small model of a family in float32, saved and imported."""
    with tempfile.TemporaryDirectory() as folder:
        family_models.model(case, dtype=torch.float32).save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names fields that change nothing
            opened = source.open_source(folder)
        models = [opened.build("float32"), opened.build("float64")]
        return dataclasses.replace(opened, build=lambda dtype: copy.deepcopy(models[dtype == "float64"]))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in VARIANTS else ()) for case in family_models.CASES],
)
def test_every_layer_of_a_family_has_its_counterpart(case):
    """Each module that the family names is there, so nothing is left out in silence."""
    opened = family_source(case)
    network = source.TransformersNetwork(opened, opened.cfg, shapes(opened.cfg))
    modules = dict(network.model.named_modules())
    assert set(network._layers) <= set(modules)
    paths = [path for entry in opened.entries for path in entry.paths]
    assert sorted(paths) == sorted(shapes(opened.cfg))
    for i in range(opened.cfg.num_layers):
        assert {f"block_{i}", f"block_{i}/attention", f"block_{i}/mlp"} <= set(network._layers.values())


def test_the_family_with_the_most_of_its_own_is_the_same_as_in_transformers():
    """Gemma 3: norms of heads first, and RoPE by layer."""
    report = parity.check_import(family_source("gemma3"), draws=1, parts=("gradients",))
    assert report.passed, report
    assert report.worst("logits").float64_rel < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("case", list(family_models.CASES))
def test_a_family_is_the_same_as_in_transformers(case):
    report = parity.check_import(family_source(case), draws=1)
    assert report.passed, report
    assert report.worst("logits").float64_rel < 1e-11


# Refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hf", "nowhere"), "nowhere is not a folder"),
        (("nanogpt", "nowhere"), "nowhere is not a folder"),
        (("jax", "FOLDER"), "reference = 'jax' is unknown: choose among hf, nanogpt"),
        (("hf", "EMPTY"), "has no config.json: give a folder that save_pretrained wrote"),
        (("nanogpt", "EMPTY"), "has no ckpt.pt and no model.py"),
        (("hf", "FOLDER", "--preset", "tiny"), "--preset is for a model with fresh parameters"),
        (("hf", "FOLDER", "--model.num-layers", 2), "--model.num-layers is for a model with fresh parameters"),
        (("hf", "FOLDER", "runs/x"), "Unrecognized options: runs/x"),
        (("hf", "RUN"), "is a run of jaxlm: leave --reference out, or give the folder that it was imported from"),
        (("hf", "FOLDER", "--text", "a"), "--step, --text and --prompt need the weights and tokenizer of a run"),
        (("hf",), "--reference hf needs the folder of the model: give DIR"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_one_line(tmp_path, arguments, said, gpt2_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    places = {"FOLDER": gpt2_folder, "EMPTY": tmp_path / "empty", "RUN": tmp_path / "run"}
    code, out, err = command("parity", "--reference", *(places.get(argument, argument) for argument in arguments))
    refusals = [line for line in err.splitlines() if line.startswith("jaxlm: error:")]
    assert (code, out, len(refusals)) == (2, "", 1), err
    assert said in refusals[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import nothing_like_it",
            "model.py cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'",
        ),
        ("x = (", "model.py cannot be imported: SyntaxError"),
        ("class GPT: pass", "model.py has no GPTConfig: give the model.py of nanoGPT"),
        ("GPTConfig = dict\nclass GPT:\n    def __init__(self, c): 1 / 0", "does not fit ckpt.pt: ZeroDivisionError"),
    ],
)
def test_a_model_py_that_fails_is_refused_in_one_line(nanogpt_folder, text, said):
    (nanogpt_folder / "model.py").write_text(text)
    code, _, err = command("parity", "--reference", "nanogpt", nanogpt_folder)
    refusals = [line for line in err.splitlines() if line.startswith("jaxlm: error:")]
    assert (code, len(refusals)) == (2, 1), err
    assert said in refusals[0]
    assert "nanogpt_model" not in sys.modules


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_a_library(monkeypatch, gpt2_folder, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = command("parity", "--reference", "hf", gpt2_folder)
    assert code == 2
    assert "which is missing: pip install 'jaxlm[parity]'" in err


def test_unknown_parts_and_tokens_are_refused(gpt2_folder):
    with pytest.raises(UserError, match="choose among gradients, decoding, sampling, positions"):
        parity.check_import(gpt2_folder, parts=("updates",))
    with pytest.raises(UserError, match="give 3 or more ids below 37 a row"):
        parity.check_import(gpt2_folder, tokens=np.full((1, 4), 37))
