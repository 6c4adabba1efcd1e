"""Models of Hugging Face transformers with random sizes and weights, and torchref's config and names for them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
import transformers

import torchref
from jaxlm.config import ModelConfig

LLAMA = {
    "model.embed_tokens": "embedding",
    "model.layers": "blocks",
    "model.norm": "final_norm",
    "lm_head": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_": "attention.query_",
    "self_attn.k_": "attention.key_",
    "self_attn.v_": "attention.value_",
    "self_attn.o_": "attention.out_",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "_proj": "",
}
"""Parts of transformers' parameter names, and what torchref has instead."""
STARCODER2 = LLAMA | {"mlp.c_fc": "mlp.up", "mlp.c": "mlp.down"}
STARCODER2["_proj"] = STARCODER2.pop("_proj")
GPT2 = {
    "transformer.wte": "embedding",
    "transformer.wpe": "position_embedding",
    "transformer.h.": "blocks.",
    "transformer.ln_f": "final_norm",
    "lm_head": "head",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attention.out",
    "attn.c_attn": "attention.query key value",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
OPT = {
    "model.decoder.embed_tokens": "embedding",
    "model.decoder.embed_positions": "position_embedding",
    "model.decoder.final_layer_norm": "final_norm",
    "model.decoder.layers": "blocks",
    "lm_head": "head",
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "mlp_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
}
OPT_OFFSET = 2
"""OPT's table begins with rows for positions it does not use."""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Transformers computes softmax, RMS norm and RoPE's angles in float32, whatever the model's type: in here what it
    calls float32 is float64, and nothing else of its code is changed.
    """
    before = torch.get_default_dtype()
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def drawn(family: str, seed: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A transformers model in float64 with large random weights, and the torchref model with the same."""
    rng = np.random.default_rng([seed, *family.encode()])
    theirs, ours = FAMILIES[family](rng)
    cfg = ModelConfig(dtype="float64", param_dtype="float64", **ours)
    torch.manual_seed(seed)
    with in_float64():
        no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        options = {"attn_implementation": "eager", "tie_word_embeddings": cfg.tie_embeddings, **no_tokens}
        config_class = getattr(transformers, f"{family}Config")
        theirs = config_class(vocab_size=cfg.vocab_size, **theirs, **options)
        model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    reference = torchref.build_model(cfg).eval()
    reference.load_state_dict(in_torchref(model), strict=True)
    return model, reference


def in_torchref(
    model: torch.nn.Module, of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> dict[str, torch.Tensor]:
    """`of` each parameter (itself, its gradient) of a transformers model, by torchref's names and in its shapes."""
    kind = model.config.model_type
    state = {}
    for name, parameter in model.named_parameters():
        value = of(parameter)
        if kind == "opt" and "embed_positions" in name:
            value = value[OPT_OFFSET:]
        for theirs, ours in {"gpt2": GPT2, "opt": OPT, "starcoder2": STARCODER2}.get(kind, LLAMA).items():
            name = name.replace(theirs, ours)
        if kind == "gpt2" and value.ndim == 2 and "blocks" in name:  # its Conv1D has weights (in, out)
            value = value.T
        before, several, after = name.partition("query key value")
        for part, piece in zip(several.split() or [""], value.chunk(3 if several else 1), strict=True):
            state[before + part + after] = piece.clone()
    if model.config.tie_word_embeddings:
        state["head.weight"] = state["embedding.weight"]
    return state


def _with_table(rng: np.random.Generator) -> tuple[dict, dict]:
    """Random sizes for GPT-2 and OPT; each names them its own way."""
    heads, width = int(rng.choice([2, 3, 5])), int(rng.choice([3, 4, 7]))
    sizes = {"embed_dim": heads * width, "num_heads": heads, "num_layers": 2, "mlp_dim": 23, "max_seq_len": 7}
    vocab_size, tied = int(rng.choice([11, 13])), bool(rng.integers(2))
    return sizes, {"vocab_size": vocab_size, "tie_embeddings": tied, **sizes}


def _gpt2(rng: np.random.Generator) -> tuple[dict, dict]:
    sizes, ours = _with_table(rng)
    names = {"n_embd": "embed_dim", "n_head": "num_heads", "n_layer": "num_layers", "n_inner": "mlp_dim"}
    theirs = {name: sizes[of] for name, of in names.items()} | {"n_positions": sizes["max_seq_len"]}
    eps = float(rng.choice([1e-5, 1e-2]))
    theirs |= {"activation_function": "gelu_new", "layer_norm_epsilon": eps}
    return theirs, ours | {"activation": "gelu_tanh", "norm_eps": eps}


def _opt(rng: np.random.Generator) -> tuple[dict, dict]:
    sizes, ours = _with_table(rng)
    theirs = _common(sizes) | {"ffn_dim": sizes["mlp_dim"], "word_embed_proj_dim": sizes["embed_dim"]}
    pre, activation = bool(rng.integers(2)), str(rng.choice(list(ACTIVATIONS)))
    theirs |= {"activation_function": ACTIVATIONS[activation], "do_layer_norm_before": pre}
    return theirs, ours | {"activation": activation, "norm_order": "pre" if pre else "post"}


def _common(ours: dict) -> dict:
    names = {"hidden_size": "embed_dim", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    return {name: ours[of] for name, of in names.items()} | {"max_position_embeddings": ours["max_seq_len"]}


def _with_rope(rng: np.random.Generator, free_width: bool) -> tuple[dict, dict]:
    """Random sizes for the Llama family: gated MLP, RMS norm, RoPE."""
    heads, kv_heads = [(3, 1), (3, 3), (4, 2), (6, 2)][rng.integers(4)]
    width = int(rng.choice([2, 4, 6]))
    eps, theta = float(rng.choice([1e-6, 1e-2])), float(rng.choice([50.0, 10000.0]))
    sizes = {"embed_dim": heads * (5 if free_width else width), "num_heads": heads, "num_layers": 2, "max_seq_len": 19}
    ours = {
        "vocab_size": int(rng.choice([11, 13])),
        **sizes,
        "num_kv_heads": kv_heads,
        "head_dim": width,
        "mlp_dim": 17,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "norm_eps": eps,
        "use_bias": False,
        "position": "rope",
        "rope_theta": theta,
        "tie_embeddings": bool(rng.integers(2)),
    }
    theirs = _common(sizes) | {
        "num_key_value_heads": kv_heads,
        "intermediate_size": 17,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    return theirs | ({"head_dim": width} if free_width else {}), ours


def _llama(rng: np.random.Generator) -> tuple[dict, dict]:
    theirs, ours = _with_rope(rng, free_width=True)
    bias = bool(rng.integers(2))
    return theirs | {"attention_bias": bias, "mlp_bias": bias}, ours | {"use_bias": bias}


def _mistral(rng: np.random.Generator) -> tuple[dict, dict]:
    theirs, ours = _with_rope(rng, free_width=True)
    window = int(rng.choice([1, 3, 4]))
    return theirs | {"sliding_window": window}, ours | {"window": window}


def _qwen(rng: np.random.Generator, third: bool) -> tuple[dict, dict]:
    theirs, ours = _with_rope(rng, free_width=third)
    window = int(rng.choice([2, 3]))
    sliding = {"use_sliding_window": True, "sliding_window": window}
    theirs |= sliding | {"layer_types": ["full_attention", "sliding_attention"]}
    return theirs, ours | {"window": (None, window), "qkv_bias": not third, "qk_norm": third}


def _starcoder2(rng: np.random.Generator) -> tuple[dict, dict]:
    theirs, ours = _with_rope(rng, free_width=False)
    activation, eps = str(rng.choice(list(ACTIVATIONS))), theirs.pop("rms_norm_eps")
    theirs |= {"hidden_act": ACTIVATIONS[activation], "norm_epsilon": eps, "sliding_window": 3}
    return theirs, ours | {"activation": activation, "norm": "layernorm", "use_bias": True, "window": 3}


FAMILIES: dict[str, Callable[[np.random.Generator], tuple[dict, dict]]] = {
    "GPT2": _gpt2,
    "OPT": _opt,
    "Llama": _llama,
    "Mistral": _mistral,
    "Qwen2": functools.partial(_qwen, third=False),
    "Qwen3": functools.partial(_qwen, third=True),
    "Starcoder2": _starcoder2,
}
"""Each function draws sizes and returns them under transformers' names and under ModelConfig's."""
