"""Folders of Hugging Face models with random weights, written without transformers."""

import json

import numpy as np
import safetensors.numpy
import tokenizers

GPT2 = {"model_type": "gpt2", "vocab_size": 37, "n_positions": 23, "n_embd": 15, "n_layer": 2, "n_head": 3}
LLAMA = {
    **{"model_type": "llama", "vocab_size": 37, "max_position_embeddings": 23, "hidden_size": 18},
    **{"num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 25},
}


def gpt2_shapes():
    found = {"transformer.wte.weight": (37, 15), "transformer.wpe.weight": (23, 15)}
    linear = {"attn.c_attn": (15, 45), "attn.c_proj": (15, 15), "mlp.c_fc": (15, 60), "mlp.c_proj": (60, 15)}
    norms = ["transformer.ln_f"]
    for i in range(2):
        for name, shape in linear.items():
            found[f"transformer.h.{i}.{name}.weight"] = shape
            found[f"transformer.h.{i}.{name}.bias"] = shape[1:]
        norms += [f"transformer.h.{i}.ln_1", f"transformer.h.{i}.ln_2"]
    return found | {f"{norm}.{leaf}": (15,) for norm in norms for leaf in ("weight", "bias")}


def llama_shapes():
    linear = {"self_attn.q_proj": (18, 18), "self_attn.k_proj": (6, 18), "self_attn.v_proj": (6, 18)}
    linear |= {"self_attn.o_proj": (18, 18), "mlp.gate_proj": (25, 18), "mlp.up_proj": (25, 18)}
    linear |= {"mlp.down_proj": (18, 25), "input_layernorm": (18,), "post_attention_layernorm": (18,)}
    found = {f"model.layers.0.{name}.weight": shape for name, shape in linear.items()}
    return found | {
        "model.embed_tokens.weight": (37, 18),
        "model.norm.weight": (18,),
        "lm_head.weight": (37, 18),
    }


def write(path, config, tensors=None):
    """A folder with this config.json and model.safetensors; the tensors are the model's own unless given."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights(config) if tensors is None else tensors, path / "model.safetensors")
    return path


def weights(config):
    shapes = gpt2_shapes() if config["model_type"] == "gpt2" else llama_shapes()
    rng = np.random.default_rng(0)
    return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def word_tokenizer():
    """The content of a tokenizer.json of Hugging Face with 10 entries, byte-level BPE on six letters."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=10, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator(["abcde abc ab de"] * 3, trainer)
    made.enable_truncation(3)
    made.enable_padding(length=20)
    return json.loads(made.to_str())
