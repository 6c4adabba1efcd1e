"""Shared by the tests of conversion: a config of every kind, and random parameters for it without compiling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from jaxlm.config import ModelConfig

BASE = ModelConfig(vocab_size=11, max_seq_len=7, num_layers=2, embed_dim=12, num_heads=3, mlp_dim=13)
SMALL = {"vocab_size": 11, "max_seq_len": 7}


def config(**changes):
    return dataclasses.replace(BASE, **changes)


CONFIGS = {
    "plain": BASE,
    "untied": config(
        tie_embeddings=False, head_bias=True, position="sinusoidal", activation="geglu", norm_order="post"
    ),
    "no biases": config(
        num_heads=4, num_kv_heads=2, head_dim=2, value_head_dim=5, position="rope", rope_layout="interleaved",
        use_bias=False, qk_norm=True, norm="rmsnorm", activation="swiglu", window=(None, 3), tie_embeddings=False,
    ),
    "multiplicative, mean_pooled": config(
        num_heads=4, num_kv_heads=2, attention_score="multiplicative", kv_sharing="mean_pooled", mlp_dim=0
    ),
    "additive, summed_scores": config(
        num_heads=4, num_kv_heads=2, attention_score="additive", score_dim=5, kv_sharing="summed_scores"
    ),
    "concat, capped": config(attention_score="concat", attention_softcap=2.0, attention_out_proj=False, norm="none"),
    "stacked": config(num_layers=4, window=(2, None), scan_layers=True, position="rope"),
    "stacked, one window": config(num_layers=3, scan_layers=True, tie_embeddings=False, remat=True),
    "bigram": ModelConfig(family="bigram", **SMALL),
    "embedding_bigram": ModelConfig(family="embedding_bigram", embed_dim=5, **SMALL),
    "embedding_bigram, untied": ModelConfig(
        family="embedding_bigram", embed_dim=5, tie_embeddings=False, head_bias=True, final_softcap=2.0, **SMALL
    ),
    "elman": ModelConfig(family="recurrent", cell="elman", cell_activation="slide", num_layers=2, embed_dim=5, **SMALL),
    "lstm": ModelConfig(family="recurrent", cell="lstm", num_layers=2, embed_dim=5, tie_embeddings=False, **SMALL),
    "gru, stacked": ModelConfig(family="recurrent", cell="gru", num_layers=3, embed_dim=5, scan_layers=True, **SMALL),
}  # fmt: skip


def random_params(cfg, seed=0):
    """Parameters of a config's shapes and types, all of one size."""
    model = jaxlm.build_model(cfg)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: jaxlm.init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def assert_bitwise(ours, reference):
    """Asserts that two trees of arrays have the same names, types, shapes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (ours, reference)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
