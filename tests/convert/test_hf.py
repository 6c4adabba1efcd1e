"""Hugging Face folders that jaxlm reads or refuses: fields, tensors, files."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from foreign_folders import GPT2, LLAMA, weights, write

from jaxlm import convert
from jaxlm.errors import UserError


@pytest.fixture
def gpt2(tmp_path):
    return write(tmp_path / "gpt2", GPT2)


def refused(source):
    with pytest.raises(UserError) as error:
        convert.from_hf(source)
    assert "\n" not in str(error.value)
    return str(error.value)


# Configs

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 10}


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (GPT2, {"model_type": "bert"}, "model_type = 'bert' is not supported: give one of llama, gpt2, mistral"),
        (GPT2, {"model_type": None}, "model_type = None is not supported"),
        (GPT2, {"model_type": ["gpt2"]}, "model_type = ['gpt2'] is not supported"),
        (LLAMA, {"model_type": "mixtral"}, "model_type = 'mixtral' is a mixture of experts"),
        (LLAMA, {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe' is a mixture of experts"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts = 8 is a mixture of experts"),
        (LLAMA, {"model_type": "gemma3"}, "model_type = 'gemma3' reads pictures too"),
        (GPT2, {"scale_attn_weights": 2}, "scale_attn_weights = 2 is not supported"),
        (GPT2, {"num_attention_heads": 5}, "num_attention_heads = 5 is not supported: n_head = 3 means the same"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        (LLAMA, {"rope_parameters": YARN | {"factor": 1.0, "attention_factor": 1.7}}, "attention_factor = 1.7"),
        (LLAMA, {"model_type": "phi", "num_attention_heads": 0}, "num_attention_heads = 0 is not supported"),
        (LLAMA, {"model_type": "stablelm", "head_dim": 4}, "head_dim = 4 is not supported"),
        (LLAMA, {"model_type": "gpt_neox", "head_dim": 4}, "head_dim = 4 is not supported"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        (GPT2, {"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        (GPT2, {"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported"),
        (GPT2, {"activation_function": "gelu_fast"}, "activation_function = 'gelu_fast' is not supported"),
        (GPT2, {"activation_function": ["gelu"]}, "activation_function = ['gelu'] is not supported"),
        (GPT2, {"n_layer": None}, "has no n_layer"),
        (GPT2, {"n_layer": "2"}, "num_layers = '2' has the wrong type"),
        (GPT2, {"n_head": 4}, "num_heads = 4 does not divide embed_dim = 15"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
        (LLAMA, {"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported: give one of silu, swish, gelu"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp = 2 is not supported"),
        (LLAMA, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        (LLAMA, {"sliding_window": 8}, "sliding_window = 8 is not supported"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_parameters.factor = None is not supported: linear needs"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "short": 3}}, "rope_parameters.short = 3"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate = False"),
        (LLAMA, {"rope_scaling": 2.0}, "rope_scaling = 2.0 is not supported"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor = None is not supported"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        (LLAMA, {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta = 6.0 is not supported"),
        (LLAMA, {"head_dim": 5}, "head_dim = 5 is odd"),
    ],
)
def test_a_field_jaxlm_cannot_compute_is_refused_by_name_and_value(tmp_path, base, changes, words):
    assert words in refused(write(tmp_path / "model", {**base, **changes}, weights(base)))


INERT = {
    **{"n_special": 0, "predict_special_tokens": True, "output_past": True, "line_by_line": False},
    **{
        "neftune_noise_alpha": 5,
        "_attn_implementation": "eager",
        "unsloth_fixed": True,
        "auto_map": {"AutoModel": "m.M"},
    },
}


def test_fields_that_transformers_does_not_read_change_nothing_and_are_listed_once(tmp_path):
    plain = convert.from_hf(write(tmp_path / "a", GPT2))
    with pytest.warns(UserWarning, match="change nothing") as said:
        found = convert.from_hf(write(tmp_path / "b", GPT2 | INERT))
    assert found[0] == plain[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], plain[1])
    assert len(said) == 1
    assert f"{', '.join(sorted(INERT))} change nothing: transformers' gpt2 does not read them" in str(said[0].message)


def test_a_rate_of_the_embedding_alone_is_said_and_passed_over(tmp_path):
    with pytest.warns(UserWarning, match="embd_pdrop = 0.2 is read as resid_pdrop = 0.1"):
        cfg, _ = convert.from_hf(write(tmp_path / "gpt2", GPT2 | {"embd_pdrop": 0.2}))
    assert cfg.dropout == 0.1


def test_fields_of_other_versions_mean_the_same(tmp_path):
    old = {"architectures": ["GPT2LMHeadModel"], "n_ctx": 23, "torch_dtype": "float32", "task_specific_params": {}}
    assert convert.from_hf(write(tmp_path / "a", {**GPT2, **old}))[0] == convert.from_hf(write(tmp_path / "b", GPT2))[0]
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "dtype": "float32", "head_dim": 6}
    old = {"rope_theta": 500.0, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "float32", "head_dim": 6}
    ours = [
        convert.from_hf(write(tmp_path / str(i), {**LLAMA, **fields}))[0] for i, fields in enumerate((new, old, {}))
    ]
    assert ours[0] == ours[1]
    assert (ours[0].rope_theta, ours[2].rope_theta) == (500.0, 10000.0)


def test_rates_and_eps_are_taken_over(tmp_path):
    rates = {"resid_pdrop": 0.25, "embd_pdrop": 0.25, "attn_pdrop": 0.5, "layer_norm_epsilon": 1e-3}
    cfg, _ = convert.from_hf(write(tmp_path / "gpt2", {**GPT2, **rates}))
    assert (cfg.dropout, cfg.attention_dropout, cfg.norm_eps) == (0.25, 0.5, 1e-3)
    cfg, _ = convert.from_hf(write(tmp_path / "llama", {**LLAMA, "attention_dropout": 0.5, "rms_norm_eps": 1e-3}))
    assert (cfg.dropout, cfg.attention_dropout, cfg.norm_eps) == (0.0, 0.5, 1e-3)


# Tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias is missing"),
        (lambda t: t.update(score=np.ones(3)), "score is unexpected"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": np.ones(15)}), "transformer.h.2.ln_1.bias is unexpected"),
        (
            lambda t: t.update({"transformer.wpe.weight": np.ones((22, 15))}),
            "transformer.wpe.weight has shape (22, 15), not (23, 15)",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.ones(15, np.int8)}),
            "transformer.ln_f.bias is of type int8, not bfloat16, float32, float64, float16",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}),
            "lm_head.weight differs from the embedding table, though the config ties them",
        ),
        (lambda t: t.update({"lm_head.weight": np.ones((37, 14))}), "lm_head.weight has shape (37, 14), not (37, 15)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    tensors = weights(GPT2)
    change(tensors)
    tensors = {name: tensor if tensor.dtype == np.int8 else tensor.astype("f") for name, tensor in tensors.items()}
    message = refused(write(tmp_path / "model", GPT2, tensors))
    assert "model.safetensors does not fit its config: " in message
    assert words in message


def test_all_that_is_amiss_comes_in_one_line(tmp_path):
    message = refused(write(tmp_path / "model", GPT2, {f"t{i}": np.ones(1, "f") for i in range(3)}))
    assert "transformer" not in message  # a name without prefix is looked for where none has one
    assert message.count("is missing") == 12
    assert message.endswith("; and 19 more")  # 28 are missing, 3 unexpected


def test_an_untied_model_needs_its_head(tmp_path):
    tensors = weights(LLAMA)
    head = tensors.pop("lm_head.weight")
    assert "lm_head.weight is missing" in refused(write(tmp_path / "model", LLAMA, tensors))
    tensors["lm_head.weight"] = head
    _, params = convert.from_hf(write(tmp_path / "model", LLAMA, tensors))
    np.testing.assert_array_equal(params["head"]["kernel"], head.T)


def test_masks_and_frequencies_beside_the_parameters_are_passed_over(tmp_path):
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 23, 23), np.uint8)}
    masks["transformer.h.1.attn.masked_bias"] = np.float32([-1e4])
    plain = convert.from_hf(write(tmp_path / "plain", GPT2))
    found = convert.from_hf(write(tmp_path / "masks", GPT2, weights(GPT2) | masks))
    assert found[0] == plain[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], plain[1])
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}
    assert convert.from_hf(write(tmp_path / "llama", LLAMA, weights(LLAMA) | frequencies))[0].dtype == "float32"


def test_float64_is_refused_in_32_bits(tmp_path):
    tensors = {name: tensor.astype(np.float64) for name, tensor in weights(GPT2).items()}
    assert "float64 weights, which need 64-bit JAX" in refused(write(tmp_path / "model", GPT2, tensors))


def test_other_types_of_floats_are_named(gpt2):
    raw = gpt2 / "model.safetensors"
    head, size = raw.read_bytes(), 8
    length = int.from_bytes(head[:size], "little")
    fields = json.loads(head[size : size + length])
    fields["transformer.ln_f.bias"]["dtype"] = "F8_E4M3"
    fields["transformer.ln_f.bias"]["shape"] = [60]
    text = json.dumps(fields).encode()
    raw.write_bytes(len(text).to_bytes(size, "little") + text + head[size + length :])
    assert "transformer.ln_f.bias is of type F8_E4M3: save it as bfloat16, float32, float64" in refused(gpt2)


# Files


def shards(folder, **places):
    """Cuts model.safetensors in two, with an index that `places` changes."""
    whole = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(whole)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
        places = dict.fromkeys(part, f"{number}.safetensors") | places
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read (No such file or directory)"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[1]"), "config.json does not hold a JSON object"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), "config.json is not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "has none of model.safetensors, pytorch_model.bin"),
        (lambda d: (d / "model.safetensors").write_bytes(b"12345"), "model.safetensors cannot be read"),
        (lambda d: (shards(d), (d / "1.safetensors").unlink()), "1.safetensors cannot be read"),
        (lambda d: shards(d, surplus="0.safetensors"), "0.safetensors does not match"),
        (lambda d: shards(d, **{"transformer.ln_f.bias": "1.safetensors"}), "ln_f.bias is missing or unexpected"),
        (lambda d: shards(d, far="../far.safetensors"), "names the file '../far.safetensors' outside its folder"),
        (lambda d: (shards(d), (d / "model.safetensors.index.json").write_text("{}")), "has no weight_map"),
    ],
)
def test_a_damaged_folder_is_named(gpt2, damage, words):
    damage(gpt2)
    assert words in refused(gpt2)


def test_shards_are_the_whole(gpt2):
    cfg, params = convert.from_hf(gpt2)
    shards(gpt2)
    found_cfg, found = convert.from_hf(gpt2)
    assert found_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_name_on_the_hub_is_not_fetched():
    assert "gpt2 is not a folder: give one that save_pretrained wrote (nothing is downloaded)" in refused("gpt2")


def test_a_folder_is_read_without_torch(gpt2):
    code = "import sys, jaxlm; jaxlm.convert.from_hf(sys.argv[1]); print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code, gpt2], capture_output=True, text=True).stdout == "set()\n"


def test_a_missing_torch_is_named_with_the_extra(gpt2, monkeypatch):
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch, which is missing: pip install 'jaxlm[parity]'" in refused(gpt2)
