"""The configurations under which jaxlm and torchref are compared. Run as a program it compares them all."""

import argparse
import itertools
import sys
import typing

import numpy as np

from jaxlm.config import ModelConfig

SMALL = {"vocab_size": 13, "max_seq_len": 17, "num_layers": 2, "embed_dim": 12}
PAIRED = {
    "kv_sharing": ("grouped", "mean_pooled", "summed_scores"),
    "attention_score": ("dot", "multiplicative", "concat", "additive"),
    "position": ("learned", "sinusoidal", "rope", "none"),
    "window": (None, 3, (2, None)),
}
"""Fields that interact in attention. Every case also uses the cache: a prefill and steps, past the wrap of each window,
and past the capacity wherever positions can go on."""

# kv_sharing, attention_score, position, window, and then other fields, spread over the rows
ROWS = [
    ("grouped", "dot", "learned", None, {}),
    ("grouped", "dot", "rope", 3, {"num_kv_heads": 1, "norm": "rmsnorm", "activation": "swiglu", "use_bias": False}),
    ("grouped", "multiplicative", "sinusoidal", (2, None), {"num_heads": 6, "num_kv_heads": 3, "init": "normal"}),
    ("grouped", "concat", "none", 3, {"attention_softcap": 2.0, "num_kv_heads": None, "norm_eps": 1e-3}),
    ("grouped", "additive", "rope", None, {"score_dim": 5, "rope_layout": "interleaved", "tie_embeddings": False}),
    ("mean_pooled", "dot", "sinusoidal", 3, {"norm_order": "post", "head_bias": True, "tie_embeddings": False}),
    ("mean_pooled", "multiplicative", "rope", None, {"rope_theta": 50.0, "qk_norm": True, "activation": "gelu_tanh"}),
    ("mean_pooled", "concat", "learned", (2, None), {"residual": False, "activation": "relu", "qkv_bias": False}),
    ("mean_pooled", "additive", "none", 3, {"mlp_dim": 0, "value_head_dim": 5, "init": "torch"}),
    ("summed_scores", "dot", "none", (2, None), {"norm": "none", "activation": "silu", "final_softcap": 3.0}),
    ("summed_scores", "multiplicative", "learned", 3, {"attention_out_proj": False, "value_head_dim": 6}),
    ("summed_scores", "concat", "sinusoidal", None, {"activation": "geglu", "mlp_dim": 7, "use_bias": False}),
    ("summed_scores", "additive", "rope", (2, None), {"scan_layers": True, "attention_softcap": 1.5}),
    (
        "grouped",
        "dot",
        "rope",
        (2, None),
        {"attention_impl": "local", "num_layers": 3, "use_bias": False, "qkv_bias": True},
    ),
    ("mean_pooled", "concat", "rope", 3, {"remat": True, "attention_impl": "reference", "qk_norm": True}),
    ("grouped", "additive", "learned", 3, {"num_kv_heads": 4, "head_dim": 5}),
    ("summed_scores", "concat", "none", 3, {"num_kv_heads": 1, "value_head_dim": 12, "norm_order": "post"}),
    ("mean_pooled", "additive", "sinusoidal", (2, None), {"norm": "rmsnorm", "norm_order": "post"}),
    ("grouped", "multiplicative", "none", None, {"num_layers": 1, "embedding_dropout": 0.5, "dropout": 0.5}),
    ("mean_pooled", "dot", "learned", None, {"attention_dropout": 0.5, "norm": "none"}),
    ("grouped", "concat", "sinusoidal", None, {"head_dim": 2}),
    ("mean_pooled", "multiplicative", "none", (2, None), {}),
    (  # GPT-NeoX's kind
        "grouped",
        "dot",
        "rope",
        None,
        {"block_layout": "parallel", "rotary_dim": 2, "attention_scale": 0.7, "norm_bias": False, "num_kv_heads": None},
    ),
    (  # Gemma's kind, scanned over a period of windows, bases and factors
        "grouped",
        "dot",
        "rope",
        (2, None),
        {
            **{"norm": "rmsnorm", "norm_order": "sandwich", "norm_unit_offset": True, "activation": "geglu_tanh"},
            **{"qk_norm": True, "embedding_scale": 3.5, "rope_theta": (50.0, 900.0), "rope_factor": (1.0, 4.0)},
            **{"rope_scaling": "linear", "scan_layers": True, "num_layers": 4, "use_bias": False},
        },
    ),
    (  # OLMo 2's kind
        "grouped",
        "dot",
        "rope",
        None,
        {
            **{"norm_order": "reordered", "qk_norm": True, "qk_norm_over": "projection", "norm_unit_offset": True},
            **{"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 40, "rope_theta": 100.0},
            **{"rope_ramp": (0.5, 3.0), "head_dim": 8},
        },
    ),
    (  # Granite's kind, under Llama 3's scaling
        "grouped",
        "multiplicative",
        "rope",
        3,
        {
            **{"residual_scale": 0.6, "logit_divisor": 3.0, "attention_out_bias": False, "attention_scale": 0.3},
            **{"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_len": 30, "head_dim": 8},
        },
    ),
    (  # Phi's kind
        "mean_pooled",
        "dot",
        "rope",
        3,
        {
            **{"block_layout": "parallel_one_norm", "head_bias": True, "tie_embeddings": False, "rotary_dim": 4},
            **{"rope_scaling": "yarn", "rope_factor": 2.0, "rope_attention_factor": 1.3, "head_dim": 6},
            **{"residual_scale": 0.8, "qk_norm": True, "qk_norm_over": "projection", "rope_layout": "interleaved"},
        },
    ),
]


def transformer(row) -> ModelConfig:
    """The config of a row: 4 query heads on 2 key heads, of a width that RoPE can rotate."""
    *paired, others = row
    fields = {"num_heads": 4, "num_kv_heads": 2, **dict(zip(PAIRED, paired, strict=True)), **others}
    if fields["position"] == "rope" and "head_dim" not in others:
        fields["head_dim"] = 4
    return ModelConfig(**{**SMALL, **fields})


FAMILIES = [
    ModelConfig(family="bigram", vocab_size=13, max_seq_len=17, final_softcap=2.0),
    ModelConfig(
        family="embedding_bigram", vocab_size=13, max_seq_len=17, embed_dim=7, tie_embeddings=False, head_bias=True
    ),
    ModelConfig(family="recurrent", cell="elman", cell_activation="slide", scan_layers=True, **SMALL),
    ModelConfig(family="recurrent", cell="elman", cell_activation="relu", tie_embeddings=False, **SMALL),
    ModelConfig(family="recurrent", cell="elman", **SMALL),
    ModelConfig(family="recurrent", cell="lstm", head_bias=True, **SMALL),
    ModelConfig(family="recurrent", cell="gru", remat=True, **SMALL),
]

CASES = [*map(transformer, ROWS), *FAMILIES]
NARROW = [
    transformer(("grouped", "dot", "rope", 3, {"dtype": "bfloat16", "norm": "rmsnorm", "activation": "swiglu"})),
    transformer(("summed_scores", "additive", "learned", None, {"dtype": "bfloat16", "param_dtype": "bfloat16"})),
    ModelConfig(family="recurrent", cell="gru", dtype="bfloat16", **SMALL),
]
"""Configs that compute in bfloat16."""

NOT_HERE = {("attention_impl", "cudnn"), ("dtype", "float64"), ("param_dtype", "float64")}
"""cuDNN needs a GPU; float64 is computed in every case."""


def pairs_missing(configs) -> set:
    """Pairs of values of PAIRED that no config has."""
    wanted = {
        frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(PAIRED, 2) for x in PAIRED[a] for y in PAIRED[b]
    }
    had = (
        frozenset({(a, getattr(c, a)), (b, getattr(c, b))})
        for c in configs
        for a, b in itertools.combinations(PAIRED, 2)
    )
    return wanted - set(had)


def values_missing(configs) -> set:
    """Values that no config has, of fields with few values; of other fields those that never vary."""
    missing = set()
    for name, hint in typing.get_type_hints(ModelConfig).items():
        had = {getattr(config, name) for config in configs}
        known = set(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else {True, False}
        if hint is bool or typing.get_origin(hint) is typing.Literal:
            missing |= {(name, value) for value in known - had}
        elif len(had) < 2:
            missing.add((name, None))
    return missing - NOT_HERE


def main() -> None:
    """Compares every case in full and prints a Markdown table of the worst errors, by type and quantity."""
    parser = argparse.ArgumentParser(
        description="Compare every configuration with PyTorch in full (many minutes) and print a Markdown table of the "
        "worst errors, by type and quantity."
    )
    parser.parse_args()
    from jaxlm import parity

    rows: dict[tuple[str, str], list] = {}
    for i, cfg in enumerate([*CASES, *NARROW]):
        report = parity.check(cfg, parity.random_params(cfg))
        for row in report.rows:
            rows.setdefault((cfg.dtype, row.quantity), []).append(row)
        print(f"{i + 1}: {'equal' if report.passed else report}", file=sys.stderr, flush=True)
    print("| type | quantity | cases | not same | worst in float64 | JAX's worst error | torch's | JAX / torch, RMS |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (dtype, quantity), compared in rows.items():
        exact = max((row.float64_rel for row in compared if row.float64_rel is not None), default=np.nan)
        failed = sum(not row.passed for row in compared)
        errors = np.array([(row.jax_error, row.torch_error) for row in compared if row.jax_error is not None])
        (in_jax, in_torch), rms = errors.max(axis=0), np.sqrt((errors**2).mean(axis=0))
        shown = f"{exact:.1e} | {in_jax:.1e} | {in_torch:.1e} | {rms[0] / rms[1]:.2f}"
        print(f"| {dtype} | {quantity} | {len(compared)} | {failed} | {shown} |")
    print(f"{len(CASES) + len(NARROW)} configurations, {sum(map(len, rows.values()))} cases")


if __name__ == "__main__":
    main()
