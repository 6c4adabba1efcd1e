"""Llama in Meta's and in llama2.c's format against a model written as Meta writes it, in float64."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from foreign import in_float64, llama
from meta_llama import TOKENS, meta_llama, save_checkpoint, save_export, save_meta, save_parts
from tolerances import FLOAT64, assert_close

import jaxlm
from jaxlm import convert
from jaxlm.convert import from_llama2c, from_meta

pytestmark = pytest.mark.x64

CASES = {
    "plain": {},
    "grouped": {"n_heads": 6, "dim": 24, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-2},
    "theta": {"rope_theta": 37, "n_layers": 1, "max_seq_len": 29},
    "scaled": {"use_scaled_rope": True, "rope_scaling_factor": 8, "rope_theta": 5e5, "dim": 32, "n_heads": 2},
}


def logits_of(cfg, params, tokens=TOKENS):
    model = jaxlm.build_model(cfg)
    like = jax.eval_shape(lambda: jaxlm.init_params(model, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    return jax.jit(lambda params: model.apply({"params": params}, tokens)[0])(params)


def check_equal(cfg, params, theirs, tokens=TOKENS):
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens))
    assert expected.std() > 0.5
    assert_close(logits_of(cfg, params, tokens), expected, FLOAT64)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_meta_is_the_same_function(tmp_path, name):
    theirs = meta_llama(**CASES[name])
    cfg, params = from_meta(save_meta(theirs, tmp_path / "meta", max_batch_size=4))
    assert (cfg.param_dtype, cfg.rope_layout, cfg.tie_embeddings) == ("float64", "interleaved", False)
    assert cfg.max_seq_len == CASES[name].get("max_seq_len", 2048)
    check_equal(cfg, params, theirs)


def test_scaled_positions_are_the_same_where_they_matter(tmp_path):
    """At position 2,000 the frequencies that are scaled have turned far enough to see."""
    theirs = meta_llama(**CASES["scaled"])
    cfg, params = from_meta(save_meta(theirs, tmp_path / "meta"))
    tokens = np.random.default_rng(1).integers(0, 37, (1, 2000))
    check_equal(cfg, params, theirs, tokens)
    plain = dataclasses.replace(cfg, rope_scaling="none", rope_factor=1.0, rope_original_len=None)
    assert np.abs(logits_of(plain, params, tokens) - logits_of(cfg, params, tokens)).max() > 1e-3


@pytest.mark.parametrize(("parts", "by_tokens"), [(2, True), (2, False), (3, False)])
def test_parts_for_model_parallelism_are_joined(tmp_path, parts, by_tokens):
    theirs = meta_llama(dim=24, n_heads=6, n_kv_heads=6, multiple_of=6, vocab_size=42)
    folder = save_parts(theirs, tmp_path / "meta", parts, by_tokens)
    check_equal(*from_meta(folder), theirs)
    text = (folder / "params.json").read_text()
    (folder / "params.json").write_text(text.replace('"vocab_size": 42', '"vocab_size": -1'))
    cfg, params = from_meta(folder)
    assert cfg.vocab_size == 42
    check_equal(cfg, params, theirs)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_llama2c_is_the_same_function(tmp_path, prefix, tied):
    theirs = meta_llama(tied, n_heads=9, n_kv_heads=3)
    save_checkpoint(theirs, tmp_path / "ckpt.pt", prefix)
    cfg, params = from_llama2c(tmp_path)
    assert (cfg.dropout, cfg.attention_dropout, cfg.max_seq_len, cfg.tie_embeddings) == (0.1, 0.1, 23, tied)
    check_equal(cfg, params, theirs)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_of_llama2c_is_the_same_function(tmp_path, version, tied):
    theirs = meta_llama(tied, n_heads=9, n_kv_heads=3).float().double()  # values of float32, as the export has them
    cfg, params = from_llama2c(save_export(theirs, tmp_path / "model.bin", version, tied))
    assert (cfg.dtype, cfg.max_seq_len, cfg.tie_embeddings) == ("float32", 23, tied)
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
    check_equal(dataclasses.replace(cfg, dtype="float64", param_dtype="float64"), params, theirs)


def test_the_same_weights_in_the_other_layout_are_the_llama_of_transformers(tmp_path, monkeypatch):
    in_float64(monkeypatch)
    theirs = llama(num_key_value_heads=1, rms_norm_eps=1e-5).double()
    state = {}
    for name, tensor in theirs.state_dict().items():
        heads = {"q_proj": 3, "k_proj": 1}.get(name.split(".")[-2])
        if heads:  # from the layout of halves to that of pairs
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        state[meta_name(name)] = tensor
    meta = meta_llama(n_kv_heads=1, hidden_dim=25)
    meta.load_state_dict(state)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits
    assert_close(meta(torch.tensor(TOKENS)).detach(), expected, FLOAT64)
    assert_close(logits_of(*from_meta(save_meta(meta, tmp_path / "meta"))), expected, FLOAT64)
    assert_close(logits_of(*convert.from_hf(theirs)), expected, FLOAT64)


def meta_name(name):
    """Meta's name of a tensor of transformers' Llama."""
    parts = {
        **{"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers"},
        **{"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv"},
        **{"self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm"},
        **{"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1"},
        **{"mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"},
    }
    for theirs, meta in parts.items():
        name = name.replace(theirs, meta)
    return name
