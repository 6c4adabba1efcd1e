"""Small models of every family of transformers, with odd sizes and weights large enough for each path to matter."""

import huggingface
import torch
import transformers

SIZES = {
    **{"vocab_size": 41, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 37},
    **{"max_position_embeddings": 80, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None},
}
GROUPED = SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36}
FREE = GROUPED | {"head_dim": 10}
"""A width of the heads that is not the model's divided by their number."""
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
LLAMA3["original_max_position_embeddings"] = 12
YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 3.0, "original_max_position_embeddings": 10}
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.5}
PART = {"rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.4}}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = FREE | {"query_pre_attn_scalar": 7, "sliding_window": 5}

CASES = {
    "gpt2": ("GPT2", {"vocab_size": 41, "n_positions": 80, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_inner": 37}),
    "gpt2 untied": (
        "GPT2",
        {
            **{"vocab_size": 41, "n_positions": 80, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_inner": None},
            **{"tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 1e-2},
        },
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            **{"vocab_size": 41, "max_position_embeddings": 80, "hidden_size": 30, "num_layers": 3, "num_heads": 5},
            **{"intermediate_size": 37, "window_size": 4},
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
        },
    ),
    "gpt_neox": ("GPTNeoX", SIZES | PART),
    "gpt_neox sequential": ("GPTNeoX", SIZES | PART | {"use_parallel_residual": False, "attention_bias": False}),
    "llama": ("Llama", FREE | {"rms_norm_eps": 1e-2}),
    "llama biases": ("Llama", GROUPED | {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama mlp biases": ("Llama", GROUPED | {"mlp_bias": True}),
    "llama 3": ("Llama", FREE | {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", FREE | {"rope_parameters": YARN}),
    "llama yarn, two coefficients": (
        "Llama",
        FREE | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8, "beta_slow": 2}},
    ),
    "llama linear": ("Llama", FREE | {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", FREE | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen3": ("Qwen3", FREE | {"use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING}),
    "starcoder2": ("Starcoder2", GROUPED | {"sliding_window": 6, "tie_word_embeddings": True}),
    "starcoder2 without biases": ("Starcoder2", GROUPED | {"use_bias": False, "hidden_act": "gelu"}),
    "olmo2": ("Olmo2", GROUPED),
    "phi": ("Phi", SIZES | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.7}}),
    "phi3": ("Phi3", GROUPED | {"sliding_window": 7}),
    "stablelm": ("StableLm", GROUPED | PART | {"use_qkv_bias": True}),
    "stablelm parallel": ("StableLm", GROUPED | PART | {"use_parallel_residual": True}),
    "granite": (
        "Granite",
        {
            **(GROUPED | {"embedding_multiplier": 3.5, "residual_multiplier": 0.4, "attention_multiplier": 0.3}),
            **{"logits_scaling": 5.0, "mlp_bias": True},
        },
    ),
    "gemma": ("Gemma", FREE),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        {
            **(GEMMA | {"layer_types": SLIDING}),
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": LINEAR,
            },
        },
    ),
}
"""The name of a config class without "Config", and its fields; each case is a family, some a variant of it."""


def model(case: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The model of a case: weights N(0, 0.15), norm scales around 1, biases too."""
    name, fields = CASES[case]
    with huggingface.in_float64():
        config = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager")
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    unit = "gemma" in case  # whose norms add 1
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            noise = torch.empty_like(parameter).normal_(0, 0.15, generator=generator)
            is_scale = ("norm" in key or ".ln_" in key) and key.endswith("weight") and not unit
            parameter.copy_(noise + is_scale)
    return made.to(dtype)
