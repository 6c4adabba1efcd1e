"""Checkpoints of nanoGPT and modules of transformers: the command on them, and what is refused."""

import argparse
import json
import pickle
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from foreign import gpt2, llama, save_nanogpt
from support import command

from jaxlm import convert
from jaxlm.convert.tensors import to_array
from jaxlm.errors import UserError
from jaxlm.model.build import build_model
from jaxlm.run.folder import load_run


@pytest.fixture
def nanogpt(tmp_path):
    save_nanogpt(gpt2(activation_function="gelu", n_inner=None), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def refused(converter, source):
    with pytest.raises(UserError) as error:
        converter(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_command_makes_a_run_of_a_nanogpt_checkpoint(nanogpt, tmp_path):
    out = tmp_path / "new"
    assert command("convert", "--from", "nanogpt", nanogpt.parent, out)[0] == 0
    cfg, params = convert.from_nanogpt(nanogpt)
    loaded = load_run(out)
    assert loaded.config.model == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert json.loads((out / "config.json").read_text())["source"]["format"] == "nanoGPT"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["model_args"].pop("bias"), "model_args has no bias"),
        (lambda r: r["model_args"].update(n_layer=1), "transformer.h.1.attn.c_attn.bias is unexpected"),
        (lambda r: r["model_args"].update(bias=False), "transformer.h.0.attn.c_attn.bias is unexpected"),
        (lambda r: r["model_args"].update(bias="yes"), "use_bias = 'yes' has the wrong type"),
        (lambda r: r["model_args"].update(n_experts=2), "model_args: n_experts = 2 is not supported"),
        (lambda r: r["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
        (lambda r: r["model"].update({"lm_head.weight": torch.ones(37, 15)}), "differs from the embedding table"),
        (lambda r: r["model"].update({"transformer.ln_f.weight": 3}), "ln_f.weight is not a dense tensor"),
        (lambda r: r.pop("model_args"), "is not a nanoGPT checkpoint: it lacks the dicts model_args and model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(nanogpt, change, words):
    record = torch.load(nanogpt)
    change(record)
    torch.save(record, nanogpt)
    assert words in refused(convert.from_nanogpt, nanogpt)


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04cut", pickle.dumps({"model": Code()}), None])
def test_a_damaged_file_and_one_with_code_are_refused(nanogpt, content, capfd):
    nanogpt.write_bytes(nanogpt.read_bytes()[:-500] if content is None else content)
    assert "cannot be read as a PyTorch checkpoint" in refused(convert.from_nanogpt, nanogpt)
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.5), r"a NumPy number of type numpy\._?core\.multiarray\.scalar"),
        (np.ones(3), r"a NumPy array of type numpy\._?core\.multiarray\._reconstruct"),
        (argparse.Namespace(lr=1), r"an object of type argparse\.Namespace"),
        (Code(), r"an object of type print"),
    ],
)
def test_what_may_run_code_is_named_by_its_type_with_the_way_out(nanogpt, value, kind, old):
    record = torch.load(nanogpt)
    torch.save({**record, "best_val_loss": value}, nanogpt, _use_new_zipfile_serialization=not old)
    message = refused(convert.from_nanogpt, nanogpt)
    assert re.search(rf"ckpt.pt holds {kind}, and only tensors", message)
    assert "leave that entry out or make it plain, as by float(x)" in message
    assert message.endswith("torch.save it again")
    assert "\x1b" not in message


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_a_wrapped_nanogpt_is_the_same_model(nanogpt, tmp_path, prefix):
    theirs = gpt2(activation_function="gelu", n_inner=None)
    save_nanogpt(theirs, tmp_path / "wrapped.pt", prefix=prefix)
    cfg, params = convert.from_nanogpt(tmp_path / "wrapped.pt")
    assert cfg == convert.from_nanogpt(nanogpt)[0]
    jax.tree.map(np.testing.assert_array_equal, params, convert.from_nanogpt(nanogpt)[1])


def test_the_activation_is_the_users_to_say(tmp_path):
    theirs = gpt2(n_inner=None)  # GELU in the tanh form, of which the checkpoint says nothing
    save_nanogpt(theirs, tmp_path / "ckpt.pt")
    cfg, params = convert.from_nanogpt(tmp_path, activation="gelu_tanh")
    ids = np.random.default_rng(0).integers(0, 37, (3, 23))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()

    def worst(cfg):
        logits = build_model(cfg).apply({"params": params}, ids)[0]
        return np.abs(logits - expected).max() / np.abs(expected).max()

    assert worst(cfg) < 1e-5
    assert worst(convert.from_nanogpt(tmp_path)[0]) > 1e-4
    assert command("convert", "--from", "nanogpt", "--activation", "gelu_tanh", tmp_path, tmp_path / "new")[0] == 0
    assert load_run(tmp_path / "new").config.model == cfg


@pytest.mark.parametrize("found", [[1], "text"])
def test_another_content_is_refused(nanogpt, found):
    torch.save(found, nanogpt)
    assert "is not a nanoGPT checkpoint" in refused(convert.from_nanogpt, nanogpt)
    nanogpt.rename(nanogpt.parent / "pytorch_model.bin")
    gpt2().config.save_pretrained(nanogpt.parent)
    assert "pytorch_model.bin does not hold a dict of tensors" in refused(convert.from_hf, nanogpt.parent)


def small(kind, **changes):
    sizes = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1}
    return kind(**sizes, num_attention_heads=1, num_key_value_heads=1, **changes)


def test_other_modules_are_refused():
    cohere = transformers.CohereForCausalLM(small(transformers.CohereConfig))
    assert "CohereForCausalLM: model_type = 'cohere' is not supported" in refused(convert.from_hf, cohere)
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    words = "LlamaForCausalLM: rope_parameters.rope_type = 'dynamic' is not supported"
    assert words in refused(convert.from_hf, llama(rope_parameters=scaled))
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(small(transformers.LlamaConfig))
    assert "model.embed_tokens.weight is not a dense tensor with values" in refused(convert.from_hf, empty)
    words = "model.norm.weight is of type torch.float8_e4m3fn: save it as bfloat16"
    narrow = llama()
    narrow.model.norm.weight = torch.nn.Parameter(narrow.model.norm.weight.to(torch.float8_e4m3fn))
    assert words in refused(convert.from_hf, narrow)
    judge = transformers.LlamaForSequenceClassification(small(transformers.LlamaConfig, pad_token_id=0))
    assert "lm_head.weight is missing; score.weight is unexpected" in refused(convert.from_hf, judge)


def test_parameters_share_no_memory_with_their_module():
    theirs = gpt2()
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    _, params = convert.from_hf(theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(params["embedding"], to_array(before["transformer.wte.weight"]))
    np.testing.assert_array_equal(params["final_norm"]["scale"], to_array(before["transformer.ln_f.weight"]))
