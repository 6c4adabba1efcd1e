"""Models of Hugging Face, from a local folder or a module in memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.families.family import Family, shapes
from jaxlm.convert.files import TensorFiles, in_memory, open_tensors, read_json
from jaxlm.convert.foreign import Fields, Tensors
from jaxlm.errors import UserError
from jaxlm.types import Params

IRRELEVANT = (
    # where the model comes from and how it is stored
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config"),
    *("model_type", "is_llama_config", "_commit_hash", "_attn_implementation_autoset", "_num_labels", "n_ctx"),
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
    *("summary_proj_to_labels", "summary_first_dropout", "classifier_dropout"),
    "_sliding_window_pattern",  # layer_types says it too
)
"""Fields that do not change the logits, whatever the family."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
"""Fields of a mixture of experts."""


@runtime_checkable
class PretrainedModule(Protocol):
    """What is read from a module of transformers."""

    @property
    def config(self) -> Any:
        """Its configuration, with `to_dict`."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its tensors by name."""


def from_hf(source: str | os.PathLike[str] | PretrainedModule) -> tuple[ModelConfig, Params]:
    """Reads the model in a local folder that `save_pretrained` wrote, or a module of transformers.

    The families are those of `jaxlm.convert.families.FAMILIES`. A folder is read without torch and transformers
    (pytorch_model.bin needs torch), one tensor at a time, and nothing is downloaded. The language model's head and
    name prefix may be missing where the config ties embeddings. Parameters and computation have the weights' type;
    float16 becomes float32, and mixed types become the one that holds all values. A warning lists entries of
    config.json that transformers' model does not read.

    Returns: the config, and parameters that `build_model(cfg)` takes.

    Raises:
      UserError: no such folder, a damaged file, a field of the config that jaxlm cannot compute, or tensors that are
        missing, unused or of other shapes; the message names each with its value.
    """
    if isinstance(source, str | os.PathLike):
        folder = Path(source)
        config, name = read_config(folder), str(folder / "config.json")
        family = family_of(config, name)
        files = open_tensors(folder)
    elif isinstance(source, PretrainedModule):
        name = type(source).__name__
        config = source.config.to_dict()
        family = family_of(config, name)
        files = in_memory(source.state_dict(), name)
    else:
        raise UserError(f"{type(source).__name__} is neither a folder nor a module of transformers: give one of these")
    return read_model(family, config, name, files)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that `save_pretrained` wrote.

    Raises:
      UserError: no such folder or file, or it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that save_pretrained wrote (nothing is downloaded)")
    return read_json(folder / "config.json")


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """The family of a config.json, which messages call `name`.

    Raises:
      UserError: there is none.
    """
    kind = config.get("model_type")
    experts = [field for field in EXPERTS if config.get(field)]
    if experts or "moe" in str(kind) or kind == "mixtral":
        which = f"{experts[0]} = {config[experts[0]]!r}" if experts else f"model_type = {kind!r}"
        raise UserError(f"{name}: {which} is a mixture of experts, which is not supported: give a dense model")
    if kind == "gemma3":
        raise UserError(
            f"{name}: model_type = 'gemma3' reads pictures too: give its text model (gemma3_text), saved on its own"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{name}: model_type = {kind!r} is not supported: give one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def read_model(family: Family, config: Mapping[str, Any], name: str, files: TensorFiles) -> tuple[ModelConfig, Params]:
    """The model of a config.json (called `name`) and its tensors; see `from_hf`."""
    fields = Fields(config, name)
    fields.ignore(IRRELEVANT)
    for field in ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"):
        fields.only(field, False)
    fields.only("is_decoder", False, True)
    fields.only("cross_attention_hidden_size", None)
    fields.only("pruned_heads", {}, None)
    fields.only("quantization_config", None)
    values = family.read_config(fields)
    tensors = Tensors(files, family.buffers)
    cfg = ModelConfig(**values, dtype=tensors.dtype, param_dtype=tensors.dtype)
    fields.ignore_rest(f"transformers' {family.model_type}")
    return cfg, read_params(family, cfg, tensors)


def read_params(family: Family, cfg: ModelConfig, tensors: Tensors) -> Params:
    """The parameters of a model whose tensors have the family's names; every tensor is used once.

    Raises:
      UserError: tensors that are missing, unused or of other shapes.
    """
    tensors.check_layers(cfg.num_layers)
    base = tensors.prefix(family.base)

    def found(name: str) -> str:
        if not base:
            name = name.removeprefix(family.base)
        module, _, leaf = name.rpartition(".")
        other = next((f"{one}.{leaf}" for one, real in family.renamed.items() if real == module), name)
        return other if other in tensors and name not in tensors else name

    head = found(f"{family.head}.weight") if cfg.tie_embeddings else None
    params = tensors.take_all([e._replace(name=found(e.name)) for e in family.entries(cfg)], shapes(cfg), head)
    if head is not None:
        tensors.check_tied(head, np.asarray(params["embedding"]))
    tensors.finish()
    return params
