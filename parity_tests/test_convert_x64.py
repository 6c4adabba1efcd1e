"""Weights imported from transformers and nanoGPT: logits, gradients and greedy tokens in float64; every bit is kept."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
import torch
from foreign import gpt2, gpt2_names, in_float64, llama, llama_names, save_nanogpt
from tolerances import FLOAT32, FLOAT64, assert_close

import jaxlm
from jaxlm import convert
from jaxlm.convert.tensors import to_array, to_tensor

pytestmark = pytest.mark.x64
os.environ["HF_HUB_OFFLINE"] = "1"

CASES = {
    "gpt2": functools.partial(gpt2),
    "gpt2 untied": functools.partial(gpt2, tie_word_embeddings=False, activation_function="gelu", n_inner=None),
    "gpt2 relu": functools.partial(gpt2, activation_function="relu", layer_norm_epsilon=1e-3),
    "llama": functools.partial(llama, num_key_value_heads=1),
    "llama tied": functools.partial(llama, tie_word_embeddings=True, rms_norm_eps=1e-2),
    "llama wide heads": functools.partial(llama, head_dim=10, num_attention_heads=6, num_key_value_heads=2),
    "llama biases": functools.partial(
        llama,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 37.0},
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 17))


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    in_float64(monkeypatch)


@functools.cache
def module(name):
    return CASES[name]().double()


def loss_of(logits, weight):
    return (logits * weight).sum()


def check_equal(cfg, params, theirs, names):
    """Compares logits, the gradient of every parameter, and ten greedy tokens of each prompt."""
    assert (cfg.dtype, cfg.param_dtype) == ("float64", "float64")
    model = jaxlm.build_model(cfg)
    like = jax.eval_shape(lambda: jaxlm.init_params(model, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), like)

    weight = np.random.default_rng(1).standard_normal((*TOKENS.shape, cfg.vocab_size))
    theirs.zero_grad()
    expected = theirs(torch.tensor(TOKENS)).logits
    loss_of(expected, torch.tensor(weight)).backward()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(params):
        logits = model.apply({"params": params}, TOKENS)[0]
        return loss_of(logits, weight), logits

    (_, logits), gradients = jax.jit(ours)(params)
    assert_close(logits, expected.detach(), FLOAT64)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    found = names(gradients)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, FLOAT64)

    prompt = to_tensor(TOKENS[:, :5])
    attended = torch.ones_like(prompt)
    continued = theirs.generate(prompt, attention_mask=attended, do_sample=False, max_new_tokens=10)[:, 5:]
    drawn = jaxlm.generate(model, params, TOKENS[:, :5], max_new_tokens=10, temperature=0, key=jax.random.key(0))
    assert np.asarray(drawn.tokens).tolist() == continued.tolist()
    assert len(set(continued.flatten().tolist())) > 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_is_the_same_function(tmp_path, bias):
    theirs = gpt2(activation_function="gelu", n_inner=None, n_head=5, resid_pdrop=0.2).double()
    if not bias:
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                parameter.data.zero_()
                parameter.requires_grad_(False)
    save_nanogpt(theirs, tmp_path / "ckpt.pt", bias, prefix="" if bias else "_orig_mod.")
    cfg, params = convert.from_nanogpt(tmp_path)
    assert (cfg.use_bias, cfg.dropout, cfg.attention_dropout, cfg.tie_embeddings) == (bias, 0.2, 0.2, True)
    check_equal(cfg, params, theirs, gpt2_names)
    again = convert.from_nanogpt(tmp_path / "ckpt.pt")
    assert again[0] == cfg
    jax.tree.map(np.testing.assert_array_equal, again[1], params)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_its_module_to_the_bit(tmp_path, name):
    theirs = module(name)
    cfg, params = convert.from_hf(theirs)
    for folder, how in (("whole", {}), ("shards", {"max_shard_size": "3KB"})):
        theirs.save_pretrained(tmp_path / folder, **how)
        read_cfg, read = convert.from_hf(tmp_path / folder)
        assert read_cfg == cfg
        jax.tree.map(np.testing.assert_array_equal, read, params)
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_folder_of_torch_files_is_its_module_to_the_bit(tmp_path, make):
    theirs = make()
    cfg, params = convert.from_hf(theirs)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    read_cfg, read = convert.from_hf(str(tmp_path))
    assert read_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(("name", "inner"), [("gpt2", "transformer"), ("llama tied", "model")])
def test_a_tied_model_needs_no_head_and_no_prefix(tmp_path, name, inner):
    theirs = module(name)
    cfg, params = convert.from_hf(theirs)
    getattr(theirs, inner).save_pretrained(tmp_path)
    bare_cfg, bare = convert.from_hf(tmp_path)
    assert bare_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, bare, params)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(("kind", "ours"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")])
def test_narrow_weights_keep_every_bit(tmp_path, make, kind, ours):
    theirs = make().to(getattr(torch, kind))
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        cfg, params = convert.from_hf(source)
        assert (cfg.dtype, cfg.param_dtype) == (ours, ours)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {ours}
        wide = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
        found = (gpt2_names if make is gpt2 else llama_names)(wide)
        for name, parameter in theirs.named_parameters():
            np.testing.assert_array_equal(found[name], to_array(parameter.double()))
    exact = dataclasses.replace(cfg, dtype="float64", param_dtype="float64")
    logits = jaxlm.build_model(exact).apply({"params": wide}, TOKENS)[0]
    assert_close(logits, theirs.double()(torch.tensor(TOKENS)).logits.detach(), FLOAT64)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_transformers_computes_untouched_is_ours_in_float32(make, monkeypatch):
    monkeypatch.undo()
    theirs = make()
    cfg, params = convert.from_hf(theirs)
    logits = jaxlm.build_model(cfg).apply({"params": params}, TOKENS)[0]
    assert_close(logits, theirs(torch.tensor(TOKENS)).logits.detach(), FLOAT32)
