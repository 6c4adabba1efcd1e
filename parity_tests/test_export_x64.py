"""Models that go out to nanoGPT and torchref, and the command that writes every format."""

import dataclasses
import json
import math

import jax
import numpy as np
import own_nanogpt
import pytest
import torch
import transformers
from support import command
from test_families_x64 import SMALL, load, logits_of, tokens_for
from tolerances import FLOAT64, assert_close

import jaxlm
import torchref
from jaxlm import convert
from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_tensor
from jaxlm.errors import UserError
from jaxlm.parity import random_params

pytestmark = pytest.mark.x64

NANOGPT = SMALL | {"mlp_dim": None, "activation": "gelu", "dropout": 0.1, "attention_dropout": 0.1}


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_own_class_computes_the_same(tmp_path, bias):
    cfg = ModelConfig(**NANOGPT, use_bias=bias)
    params = random_params(cfg)
    convert.to_nanogpt(cfg, params, tmp_path / "out", step=7)
    record = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    theirs = own_nanogpt.GPT(own_nanogpt.GPTConfig(**record["model_args"])).double().eval()
    theirs.load_state_dict(record["model"], strict=True)
    tokens = tokens_for(cfg)
    given = torch.tensor(tokens)
    with torch.no_grad():
        expected = theirs(given, given)[0]
    assert_close(jaxlm.build_model(cfg).apply({"params": params}, tokens)[0], expected, FLOAT64)
    assert record["iter_num"] == 7
    back_cfg, back = convert.from_nanogpt(tmp_path / "out")
    assert back_cfg == dataclasses.replace(cfg, mlp_dim=None)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "gelu_tanh"}, "nanogpt, has activation = 'gelu' and not 'gelu_tanh'"),
        ({"mlp_dim": 30}, "has mlp_dim = 96 and not 30"),
        ({"position": "rope"}, "has position = 'learned' and not 'rope'"),
        ({"norm_eps": 1e-6}, "has norm_eps = 1e-05 and not 1e-06"),
        ({"tie_embeddings": False}, "has tie_embeddings = True and not False"),
    ],
)
def test_what_nanogpt_cannot_hold_is_refused_with_the_field(tmp_path, changes, words):
    cfg = ModelConfig(**(NANOGPT | changes))
    with pytest.raises(UserError) as error:
        convert.to_nanogpt(cfg, {}, tmp_path / "out")
    assert words in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_torchref_reads_its_folder_and_gives_it_back(tmp_path, tied):
    cfg = ModelConfig(**SMALL, tie_embeddings=tied, num_kv_heads=2, window=(3, None), scan_layers=tied)
    params = jaxlm.init_params(jaxlm.build_model(cfg), jax.random.key(0))
    convert.save_torchref(cfg, params, tmp_path / "out")
    back_cfg, back = convert.load_torchref(tmp_path / "out")
    assert back_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, back, params)
    model = torchref.build_model(cfg).eval()
    model.load_state_dict(convert.to_torchref(cfg, back), strict=True)
    tokens = tokens_for(cfg)
    with torch.no_grad():
        expected = model(to_tensor(tokens).long())
    assert_close(jaxlm.build_model(cfg).apply({"params": params}, tokens)[0], expected, FLOAT64)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps in float64 on a text of its own."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    sizes = ("--model.num-layers", 1, "--model.embed-dim", 12, "--model.num-heads", 2, "--model.max-seq-len", 31)
    types = ("--model.dtype", "float64", "--model.param-dtype", "float64", "--optim.warmup-steps", 0)
    data = ("--data.val-fraction", 0.3, "--data.path", folder / "text.txt", "--sample.max-new-tokens", 3)
    steps = ("--train.steps", 2, "--train.batch-size", 2)
    assert command("train", "tiny", *sizes, *types, *data, *steps, "--out", folder / "run")[0] == 0
    return folder / "run"


def test_a_trained_run_goes_to_hugging_face_and_draws_the_same_text(run, tmp_path):
    code, stdout, stderr = command("convert", "--to", "hf", run, tmp_path / "out", "--shard-size", "20KB", "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["written"] == "transformers' gpt2"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = jaxlm.load_run(run)
    theirs = load(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the quick\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == loaded.tokenizer.encode(text).tolist()
    drawn = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, pad_token_id=0)
    code, stdout, _ = command(*("sample", run, "--prompt", text, "--temperature", 0, "--max-new-tokens", 9, "--json"))
    assert json.loads(stdout)["texts"] == [tokenizer.decode(drawn[0])]
    card = (tmp_path / "out" / "README.md").read_text()
    row = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line][-1]
    assert f"| validation loss | {row['val_loss']:.4f} nats per token |" in card
    assert f"| perplexity | {math.exp(row['val_loss']):.4f} |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("target", ["nanogpt", "torchref"])
def test_a_run_goes_there_and_comes_back(run, tmp_path, target):
    assert command("convert", "--to", target, run, tmp_path / "out")[0] == 0
    assert command("convert", "--from", target, tmp_path / "out", tmp_path / "back")[0] == 0
    ours, back = jaxlm.load_run(run), jaxlm.load_run(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


def test_the_proof_lies_beside_the_weights(run, tmp_path):
    code, stdout, stderr = command("convert", "--to", "hf", run, tmp_path / "out", "--report")
    assert code == 0, stderr
    assert "equal up to rounding" in stdout
    assert json.loads((tmp_path / "out" / "parity" / "report.json").read_text())["passed"] is True
    assert (tmp_path / "out" / "parity" / "index.html").is_file()
    assert command("convert", "--from", "hf", tmp_path / "out", tmp_path / "back")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--from is needed: give which format SRC has"),
        (["--from", "jaxlm"], "--from is needed: give another format than --to jaxlm"),
        (["--from", "hf", "--to", "hf"], "give another format than --to hf"),
        (["--to", "hf", "--activation", "gelu"], "--activation gelu is for --from nanogpt"),
        (["--to", "hf", "--tokenizer", "ids"], "--tokenizer ids is for models without one"),
        (["--to", "torchref", "--report"], "--report is for --to hf, not torchref"),
        (["--to", "hf", "--shard-size", "5"], "'5' is no size"),
        (["--to", "hf", "--step", "99"], "99"),
        (["--from", "hf", "--step", "1"], "--step 1 is for the checkpoints of a run"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, tmp_path, options, words):
    code, _, stderr = command("convert", *options, run, tmp_path / "out")
    assert code == 2
    assert words in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for target in ("hf", "nanogpt", "torchref"):
        code, _, stderr = command("convert", "--to", target, run, tmp_path / "out")
        assert (code, "already holds something" in stderr) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_logits_of_the_loaded_folder_are_the_runs(run, tmp_path):
    command("convert", "--to", "hf", run, tmp_path / "out")
    loaded = jaxlm.load_run(run)
    tokens = tokens_for(loaded.config.model)
    ours = loaded.model.apply({"params": loaded.params}, tokens)[0]
    assert_close(ours, logits_of(load(tmp_path / "out"), tokens), FLOAT64)
