"""Configurations that tests share: one transformer of co-prime sizes, and a variant of it for each option."""

import dataclasses

from jaxlm.config import ModelConfig

# Co-prime sizes, so that swapped axes fail: B 3, T 7, D 24, N 4 x H 6, K 2, F 20, V 11, L 2.
BASE = ModelConfig(
    vocab_size=11, max_seq_len=7, num_layers=2, embed_dim=24, num_heads=4, num_kv_heads=2, mlp_dim=20, position="rope"
)


def variant(**fields):
    return dataclasses.replace(BASE, **fields)


def family(name, **fields):
    return ModelConfig(vocab_size=11, max_seq_len=7, family=name, **fields)


VARIANTS = {
    "rope": BASE,
    "interleaved": variant(rope_layout="interleaved"),
    "learned": variant(position="learned"),
    "sinusoidal": variant(position="sinusoidal"),
    "no_position": variant(position="none"),
    "multi_head": variant(num_kv_heads=None),
    "multi_query": variant(num_kv_heads=1),
    "narrow_heads": variant(head_dim=4),
    "rmsnorm": variant(norm="rmsnorm"),
    "no_norm": variant(norm="none"),
    "post_norm": variant(norm_order="post"),
    "no_residual": variant(residual=False),
    "no_bias": variant(use_bias=False),
    "qkv_bias": variant(use_bias=False, qkv_bias=True),
    "head_bias_untied": variant(head_bias=True, tie_embeddings=False),
    "no_out_proj": variant(attention_out_proj=False),
    "no_mlp": variant(mlp_dim=0),
    "gelu_tanh": variant(activation="gelu_tanh"),
    "relu": variant(activation="relu"),
    "silu": variant(activation="silu"),
    "swiglu": variant(activation="swiglu"),
    "geglu": variant(activation="geglu"),
    "window": variant(window=3),
    "window_pattern": variant(window=(2, None)),
    "local": variant(window=(2, 4), attention_impl="local"),
    "local_additive_capped": variant(
        window=3, attention_impl="local", attention_score="additive", attention_softcap=0.7
    ),
    "mean_pooled": variant(kv_sharing="mean_pooled"),
    "summed_scores": variant(kv_sharing="summed_scores"),
    "multiplicative": variant(attention_score="multiplicative"),
    "concat": variant(attention_score="concat"),
    "additive": variant(attention_score="additive", score_dim=5),
    "summed_multiplicative": variant(kv_sharing="summed_scores", attention_score="multiplicative"),
    "summed_additive": variant(kv_sharing="summed_scores", attention_score="additive"),
    "qk_norm": variant(qk_norm=True),
    "attention_softcap": variant(attention_softcap=2.0),
    "final_softcap": variant(final_softcap=3.0),
    "wide_values": variant(value_head_dim=7),
    "scan_layers": variant(scan_layers=True, num_layers=4, window=(3, None)),
    "remat": variant(remat=True, mlp_dim=19),
    "bigram": family("bigram"),
    "bigram_capped": family("bigram", final_softcap=1.5),
    "embedding_bigram": family("embedding_bigram", embed_dim=6),
    "elman_tanh": family("recurrent", embed_dim=6, num_layers=2),
    "elman_relu": family("recurrent", embed_dim=6, num_layers=2, cell_activation="relu"),
    "elman_slide": family("recurrent", embed_dim=6, num_layers=2, cell_activation="slide", tie_embeddings=False),
    "lstm": family("recurrent", embed_dim=6, num_layers=2, cell="lstm"),
    "gru_scanned": family("recurrent", embed_dim=6, num_layers=2, cell="gru", scan_layers=True, remat=True),
}
