"""GPT-2 and Llama models of Hugging Face, from a local folder or a module in memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors

from jaxlm.config import ModelConfig
from jaxlm.convert import gpt2
from jaxlm.convert.foreign import Fields, Linear, Tensors
from jaxlm.convert.tensors import FLOATS, load_torch, on_device, to_arrays
from jaxlm.errors import UserError
from jaxlm.types import Params

IRRELEVANT = (
    # where the model comes from and how it is stored
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config"),
    *("model_type", "is_llama_config", "_commit_hash", "_attn_implementation_autoset", "_num_labels"),
    # how it is used, trained and sampled from
    *("use_cache", "gradient_checkpointing", "initializer_range", "return_dict", "output_attentions"),
    *("output_hidden_states", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
    *("tokenizer_class", "prefix", "task_specific_params", "problem_type", "finetuning_task"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *(
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "begin_suppress_tokens",
    ),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "max_sequence_length"),
    # heads other than the language model's, whose tensors would be left over
    *("id2label", "label2id", "num_labels", "summary_type", "summary_use_proj", "summary_activation"),
    *("summary_proj_to_labels", "summary_first_dropout"),
)
"""Fields that do not change the logits."""
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu"}
ACTIVATIONS |= {"relu": "relu", "silu": "silu", "swish": "silu"}
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"}
_READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Types of safetensors that NumPy has; masks may have any of them."""


@runtime_checkable
class PretrainedModule(Protocol):
    """What is read from a module of transformers."""

    @property
    def config(self) -> Any:
        """Its configuration, with `to_dict`."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its tensors by name."""


def from_hf(source: str | os.PathLike[str] | PretrainedModule) -> tuple[ModelConfig, Params]:
    """Reads the model in a local folder that `save_pretrained` wrote, or a GPT-2 or Llama module of transformers.

    A folder is read without torch and transformers (pytorch_model.bin needs torch), and nothing is downloaded. The
    language model's head and name prefix may be missing where the config ties embeddings. Parameters and computation
    have the weights' type; float16 becomes float32, and mixed types become the one that holds all values.

    Returns: the config, and parameters that `build_model(cfg)` takes.

    Raises:
      UserError: no such folder, a damaged file, a field of the config that jaxlm does not know or cannot compute, or
        tensors that are missing, unused or of other shapes; the message names each with its value.
    """
    if isinstance(source, str | os.PathLike):
        folder = Path(source)
        config, name = _read_config(folder), str(folder / "config.json")
        kind = _architecture(config, name)
        tensors, where = _read_tensors(folder)
    elif isinstance(source, PretrainedModule):
        name = where = type(source).__name__
        config = source.config.to_dict()
        kind = _architecture(config, name)
        tensors = to_arrays(source.state_dict(), name)
    else:
        raise UserError(f"{type(source).__name__} is neither a folder nor a module of transformers: give one of these")
    fields = Fields(config, name)
    fields.ignore(IRRELEVANT)
    fields.only("is_encoder_decoder", False)
    fields.only("is_decoder", False, True)
    fields.only("add_cross_attention", False)
    fields.only("tie_encoder_decoder", False)
    fields.only("cross_attention_hidden_size", None)
    fields.only("pruned_heads", {}, None)
    return (_gpt2 if kind == "gpt2" else _llama)(fields, tensors, where)


def _architecture(config: Mapping[str, Any], name: str) -> str:
    kind = config.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{name}: model_type = {kind!r} is not supported: give a model of type gpt2 or llama")
    return kind


def _gpt2(fields: Fields, arrays: Mapping[str, np.ndarray], where: str) -> tuple[ModelConfig, Params]:
    tensors = Tensors(arrays, where, gpt2.BUFFERS)
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("reorder_and_upcast_attn", False)
    length = fields.required("n_positions")
    fields.only("n_ctx", length)
    dropout = fields.optional("resid_pdrop", 0.1)
    embedding_dropout = fields.optional("embd_pdrop", 0.1)
    if embedding_dropout != dropout:
        fields.refuse(
            "embd_pdrop", embedding_dropout, f"jaxlm has one dropout rate; make it equal to resid_pdrop = {dropout!r}"
        )
    cfg = ModelConfig(
        vocab_size=fields.required("vocab_size"),
        max_seq_len=length,
        num_layers=fields.required("n_layer"),
        embed_dim=fields.required("n_embd"),
        num_heads=fields.required("n_head"),
        mlp_dim=fields.optional("n_inner", None),
        activation=fields.translated("activation_function", "gelu_new", ACTIVATIONS),
        norm_eps=fields.optional("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.optional("tie_word_embeddings", True),
        dropout=dropout,
        attention_dropout=fields.optional("attn_pdrop", 0.1),
        dtype=tensors.dtype,
        param_dtype=tensors.dtype,
    )
    fields.finish()
    params = gpt2.gpt2_params(cfg, tensors, tensors.prefix("transformer."), transposed=False)
    return _with_head(cfg, params, tensors)


def _llama(fields: Fields, arrays: Mapping[str, np.ndarray], where: str) -> tuple[ModelConfig, Params]:
    tensors = Tensors(arrays, where, r"rotary_emb\.inv_freq")
    fields.only("pretraining_tp", 1, None)
    fields.only("rope_interleaved", False)
    fields.only("sliding_window", None)
    fields.only("use_sliding_window", False)
    biases = {name: fields.optional(name, False) for name in ("attention_bias", "mlp_bias")}
    if biases["attention_bias"] != biases["mlp_bias"]:
        fields.refuse(
            "attention_bias",
            biases["attention_bias"],
            f"jaxlm has biases in both or in neither, and mlp_bias = {biases['mlp_bias']!r}",
        )
    cfg = ModelConfig(
        vocab_size=fields.required("vocab_size"),
        max_seq_len=fields.required("max_position_embeddings"),
        num_layers=fields.required("num_hidden_layers"),
        embed_dim=fields.required("hidden_size"),
        num_heads=fields.required("num_attention_heads"),
        num_kv_heads=fields.optional("num_key_value_heads", None),
        head_dim=fields.optional("head_dim", None),
        mlp_dim=fields.required("intermediate_size"),
        activation=fields.translated("hidden_act", "silu", GATES),
        norm="rmsnorm",
        norm_eps=fields.optional("rms_norm_eps", 1e-6),
        use_bias=biases["mlp_bias"],
        init="normal",
        tie_embeddings=fields.optional("tie_word_embeddings", False),
        position="rope",
        rope_theta=_rope_theta(fields),
        rope_layout="half",
        attention_dropout=fields.optional("attention_dropout", 0.0) or 0.0,
        dtype=tensors.dtype,
        param_dtype=tensors.dtype,
    )
    fields.finish()
    return _with_head(cfg, _llama_params(cfg, tensors, tensors.prefix("model.")), tensors)


def _rope_theta(fields: Fields) -> float:
    """The base of RoPE's frequencies: in rope_parameters since transformers 5, before that beside rope_scaling."""
    theta = fields.optional("rope_theta", None)
    for name in ("rope_parameters", "rope_scaling"):
        options = fields.optional(name, None)
        if options is None:
            continue
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        if not isinstance(options, Mapping):
            fields.refuse(name, options, "give an object")
        for key, value in options.items():
            if key == "rope_theta" and theta in (None, value):
                theta = value
            elif value is not None and plain.get(key) != value:
                fields.refuse(
                    f"{name}.{key}", value, "jaxlm rotates the whole head, by the plain frequencies of one base"
                )
    return 10000.0 if theta is None else theta


def _llama_params(cfg: ModelConfig, tensors: Tensors, prefix: str) -> Params:
    linear, width, mlp = Linear(tensors, transposed=True), cfg.embed_dim, cfg.resolved.mlp_dim
    queries, keys = cfg.num_heads * cfg.resolved.head_dim, cfg.resolved.num_kv_heads * cfg.resolved.head_dim

    def norm(name: str) -> Params:
        return {"scale": tensors.take(f"{name}.weight", width)}

    params: Params = {
        "embedding": tensors.take(f"{prefix}embed_tokens.weight", cfg.vocab_size, width),
        "final_norm": norm(f"{prefix}norm"),
    }
    for i in range(cfg.num_layers):
        block = f"{prefix}layers.{i}"
        params[f"block_{i}"] = {
            "attention_norm": norm(f"{block}.input_layernorm"),
            "attention": {
                "query": linear.layer(f"{block}.self_attn.q_proj", width, queries, cfg.use_bias),
                "key": linear.layer(f"{block}.self_attn.k_proj", width, keys, cfg.use_bias),
                "value": linear.layer(f"{block}.self_attn.v_proj", width, keys, cfg.use_bias),
                "out": linear.layer(f"{block}.self_attn.o_proj", queries, width, cfg.use_bias),
            },
            "mlp_norm": norm(f"{block}.post_attention_layernorm"),
            "mlp": {
                "gate": linear.layer(f"{block}.mlp.gate_proj", width, mlp, cfg.use_bias),
                "up": linear.layer(f"{block}.mlp.up_proj", width, mlp, cfg.use_bias),
                "down": linear.layer(f"{block}.mlp.down_proj", mlp, width, cfg.use_bias),
            },
        }
    return params


def _with_head(cfg: ModelConfig, params: Params, tensors: Tensors) -> tuple[ModelConfig, Params]:
    if cfg.tie_embeddings:
        tensors.check_tied("lm_head.weight", params["embedding"])
    else:
        head = Linear(tensors, transposed=True).layer("lm_head", cfg.embed_dim, cfg.vocab_size, use_bias=False)
        params = {**params, "head": head}
    tensors.finish()
    return cfg, on_device(params)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that save_pretrained wrote (nothing is downloaded)")
    return _read_json(folder / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a folder that save_pretrained wrote") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: save the model again")
    return content


def _read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads all tensors of a folder; returns them and the file that says which they are."""
    names = ("model.safetensors", "pytorch_model.bin")
    for name in (names[0], f"{names[0]}.index.json", names[1], f"{names[1]}.index.json"):
        file = folder / name
        if not file.exists():
            continue
        if name.endswith(".index.json"):
            return _read_shards(file), str(file)
        return _read_file(file), str(file)
    raise UserError(
        f"{folder} has neither {names[0]} nor {names[1]}, whole or in shards: save the model's weights there"
    )


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no weight_map from tensors to files: save the model again")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UserError(f"{index} names the file {name!r} outside its folder: put all shards beside it")
        shard = _read_file(index.parent / name)
        wrong = [tensor for tensor in shard if places.get(tensor) != name]
        wrong += [tensor for tensor, place in places.items() if place == name and tensor not in shard]
        if wrong:
            raise UserError(
                f"{index.parent / name} does not match {index.name}: {wrong[0]} is missing or unexpected; save again"
            )
        arrays |= shard
    return arrays


def _read_file(file: Path) -> dict[str, np.ndarray]:
    if file.suffix != ".safetensors":
        tensors = load_torch(file)
        if not isinstance(tensors, Mapping):
            raise UserError(f"{file} does not hold a dict of tensors: save the model again")
        return to_arrays(tensors, str(file))
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            names = list(opened.keys())
            for name in names:
                if (kind := opened.get_slice(name).get_dtype()) not in _READABLE:
                    raise UserError(f"{file}: {name} is of type {kind}: save it as {', '.join(FLOATS)}")
            return {name: opened.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): it is missing or damaged; copy it again") from None
