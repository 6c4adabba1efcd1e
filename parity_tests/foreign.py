"""Models of other libraries with random weights, and jaxlm's gradients under their names, for tests of converters."""

import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama


def randomised(model, seed=0):
    """Sets every parameter to N(0, 0.3), norm scales around 1: large enough for each path to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter, dtype=torch.float64).normal_(0, 0.3, generator=generator)
            parameter.copy_(noise + (1 if "norm" in name or ".ln_" in name else 0) * ("weight" in name))
    return model.eval()


def gpt2(seed=0, **changes):
    fields = {
        **{"vocab_size": 37, "n_positions": 23, "n_embd": 15, "n_layer": 2, "n_head": 3, "n_inner": 22},
        **{"bos_token_id": 0, "eos_token_id": None, **changes},
    }
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)), seed)


def llama(seed=0, **changes):
    fields = {
        **{"vocab_size": 37, "max_position_embeddings": 23, "hidden_size": 18, "num_hidden_layers": 2},
        **{"num_attention_heads": 3, "intermediate_size": 25, "bos_token_id": 0, "eos_token_id": None, **changes},
    }
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)), seed)


def in_float64(monkeypatch):
    """Makes transformers compute RMS norms and rotary angles in float64; it uses float32 whatever the model's type."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self, x, position_ids):
        width = 2 * len(self.inv_freq)
        base = self.config.rope_parameters["rope_theta"]
        turns = base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
        both = (position_ids[..., None] * turns).repeat(1, 1, 2)
        return both.cos(), both.sin()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", angles)


def gpt2_names(tree):
    """jaxlm's tree (parameters or gradients) of a GPT-2, under Hugging Face's names and in its layout."""
    found = {
        "transformer.wte.weight": tree["embedding"],
        "transformer.wpe.weight": tree["position_embedding"],
        **_layer("transformer.ln_f", tree["final_norm"]),
    }
    for i in range(2):
        block, name = tree[f"block_{i}"], f"transformer.h.{i}"
        attention = block["attention"]
        fused = {
            leaf: np.concatenate([attention[part][leaf] for part in ("query", "key", "value")], axis=-1)
            for leaf in attention["query"]
        }
        found |= _layer(f"{name}.ln_1", block["attention_norm"]) | _layer(f"{name}.ln_2", block["mlp_norm"])
        found |= _layer(f"{name}.attn.c_attn", fused) | _layer(f"{name}.attn.c_proj", attention["out"])
        found |= _layer(f"{name}.mlp.c_fc", block["mlp"]["up"]) | _layer(f"{name}.mlp.c_proj", block["mlp"]["down"])
    return found | _head(tree)


def llama_names(tree):
    """The same for a Llama, whose weights are (out, in)."""
    found = {"model.embed_tokens.weight": tree["embedding"], "model.norm.weight": tree["final_norm"]["scale"]}
    for i in range(2):
        block, name = tree[f"block_{i}"], f"model.layers.{i}"
        found[f"{name}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        found[f"{name}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
            found |= _layer(f"{name}.self_attn.{theirs}_proj", block["attention"][ours], np.transpose)
        for part in ("gate", "up", "down"):
            found |= _layer(f"{name}.mlp.{part}_proj", block["mlp"][part], np.transpose)
    return found | _head(tree)


def _layer(name, leaves, turn=np.asarray):
    kinds = {"kernel": ("weight", turn), "scale": ("weight", np.asarray), "bias": ("bias", np.asarray)}
    return {f"{name}.{kinds[leaf][0]}": kinds[leaf][1](value) for leaf, value in leaves.items()}


def _head(tree):
    return {"lm_head.weight": np.transpose(tree["head"]["kernel"])} if "head" in tree else {}


def save_nanogpt(model, path, bias=True, prefix=""):
    """Saves a GPT-2 with GELU and tied embeddings as nanoGPT does: weights (out, in), masks beside the parameters."""
    cfg, state = model.config, {}
    for name, tensor in model.state_dict().items():
        linear = ".c_" in name and name.endswith("weight")
        if bias or not name.endswith(".bias"):
            state[prefix + name] = (tensor.T if linear else tensor).contiguous()
    for i in range(cfg.n_layer):
        state[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, cfg.n_positions, cfg.n_positions).tril()
    sizes = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    args = {**sizes, "block_size": cfg.n_positions, "bias": bias, "dropout": cfg.resid_pdrop}
    record = {"model": state, "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {}}
    torch.save(record, path)
    return record
