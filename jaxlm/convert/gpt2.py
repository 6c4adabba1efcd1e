"""The parameters of the GPT-2 architecture, whose tensors have the same names in Hugging Face and nanoGPT."""

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.foreign import Linear, Tensors
from jaxlm.types import Params

BUFFERS = r"h\.\d+\.attn\.(masked_)?bias"
"""A pattern for causal masks, which old versions store beside the parameters."""


def gpt2_params(cfg: ModelConfig, tensors: Tensors, prefix: str, transposed: bool) -> Params:
    """Builds parameters from tensors PREFIXh.0.attn.c_attn.weight and so on; `transposed` if weights are (out, in)."""
    linear, width = Linear(tensors, transposed), cfg.embed_dim

    def norm(name: str) -> Params:
        bias = {"bias": tensors.take(f"{name}.bias", width)} if cfg.use_bias else {}
        return {"scale": tensors.take(f"{name}.weight", width), **bias}

    params: Params = {
        "embedding": tensors.take(f"{prefix}wte.weight", cfg.vocab_size, width),
        "position_embedding": tensors.take(f"{prefix}wpe.weight", cfg.max_seq_len, width),
        "final_norm": norm(f"{prefix}ln_f"),
    }
    for i in range(cfg.num_layers):
        block = f"{prefix}h.{i}"
        fused = linear.layer(f"{block}.attn.c_attn", width, 3 * width, cfg.use_bias)
        parts = {name: np.split(leaf, 3, axis=-1) for name, leaf in fused.items()}
        qkv = ("query", "key", "value")
        params[f"block_{i}"] = {
            "attention_norm": norm(f"{block}.ln_1"),
            "attention": {
                **{which: {name: part[j] for name, part in parts.items()} for j, which in enumerate(qkv)},
                "out": linear.layer(f"{block}.attn.c_proj", width, width, cfg.use_bias),
            },
            "mlp_norm": norm(f"{block}.ln_2"),
            "mlp": {
                "up": linear.layer(f"{block}.mlp.c_fc", width, cfg.resolved.mlp_dim, cfg.use_bias),
                "down": linear.layer(f"{block}.mlp.c_proj", cfg.resolved.mlp_dim, width, cfg.use_bias),
            },
        }
    return params
