"""Converters: transposed and fused weights, norms, ties, and fields of config.json that are read wrongly."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxlm.convert import hf
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import ACTIVATIONS, Choice, Computed, LayerTypes, Window
from jaxlm.convert.families.rope import LayeredRope, Rope, _scaling, rotary_dim
from jaxlm.convert.foreign import Tensors
from jaxlm.convert.layouts import Layout
from jaxlm.convert.torchref import turned
from planted.bugs import Bug, Edit, TableEdit, bug, edit

ATTENTION, MLP = "block_0/attention", "block_0/mlp"


def imported(case: str, name: str, what: str, layer: str, cause: str, *edits: Edit | TableEdit) -> Bug:
    """A bug that shows in a model of `family_models.CASES`."""
    return Bug(name, what, layer, cause, edits, {"case": case}, check="imports", make=lambda case: case)


def table(model_type: str, old: str, new: str, **changes: Any) -> TableEdit:
    """A family with other entries; a function makes an entry from the old one."""
    family = FAMILIES[model_type]
    values = {name: value(getattr(family, name)) if callable(value) else value for name, value in changes.items()}
    return TableEdit(
        FAMILIES, model_type, dataclasses.replace(family, **values), "jaxlm.convert.families.FAMILIES", (old, new)
    )


def without(theirs: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The fields of a family but one."""
    return lambda fields: tuple(field for field in fields if getattr(field, "theirs", None) != theirs)


def other(theirs: str, field: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The fields of a family with another reader of one entry."""
    return lambda fields: (*without(theirs)(fields), field)


SPLIT = "parts = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)"
BUGS = [
    bug(
        "conversion that leaves square kernels as they are",
        "Kernels are transposed on the way to torch, except square ones.",
        "block_0/attention/query", "kernel transposed!",
        edit(turned, 'if path.endswith("/kernel")',
             'if path.endswith("/kernel") and array.shape != array.shape[::-1]'),
    ),
    imported(
        "llama biases", "square weights imported transposed",
        "Weights of torch's Linear are transposed, except square ones.",
        "block_0/attention/query", "kernel transposed!",
        edit(Layout.split, "tensor.T if self.transposed",
             "tensor.T if self.transposed and tensor.shape != tensor.shape[::-1]"),
    ),
    imported(
        "gpt2", "Conv1D read as Linear",
        "A square weight of GPT-2, which is stored (in, out), is transposed.",
        "block_0/attention/out", "kernel transposed!",
        edit(Family.entries, "not any(part in name for part in self.plain)",
             '(name.endswith("attn.c_proj") or not any(part in name for part in self.plain))'),
    ),
    imported(
        "gpt2", "fused projections in another order",
        "The fused tensor of GPT-2 is split into keys, queries, values.",
        ATTENTION, "query and key exchanged!",
        edit(Layout.split, SPLIT,
             f"{SPLIT}\n        parts = [parts[i] for i in (1, 0, 2)] if len(parts) == 3 else parts"),
    ),
    imported(
        "gpt_neox", "fused heads taken as fused projections",
        "GPT-NeoX keeps query, key and value of each head together; they are split as if all queries came first.",
        ATTENTION, "head by head!",
        table("gpt_neox", "by_heads=True", "by_heads=False", by_heads=False),
    ),
    imported(
        "phi3", "gate and up of a fused tensor exchanged",
        "The fused tensor of Phi 3's MLP is split into up and gate.",
        MLP, "gate and up exchanged!",
        edit(Layout.split, SPLIT, SPLIT + "\n        parts = parts[::-1] if len(parts) == 2 else parts"),
    ),
    imported(
        "llama", "head of an untied model read from the embedding",
        "The head is the transposed embedding, though the config does not tie them.",
        "head", "head/kernel is embedding transposed!",
        edit(hf.read_params, "    return params",
             '    return {**params, **({"head": {"kernel": params["embedding"].T}} if "head" in params else {})}'),
    ),
    imported(
        "gemma", "norms without their one",
        "Gemma's norms multiply by the scale, not by 1 + scale.",
        "block_0/attention_norm", "norm_unit_offset = True!",
        table("gemma", '"norm_unit_offset": True', '"norm_unit_offset": False',
              always=lambda always: {**always, "norm_unit_offset": False}),
    ),
    imported(
        "gemma", "embedding not scaled",
        "Gemma's embedding vectors are not multiplied by the root of their width.",
        "embedding", "embedding_scale!",
        table("gemma", 'Computed("hidden_size", "embedding_scale", math.sqrt, ...)', "",
              fields=lambda fields: tuple(f for f in fields if getattr(f, "ours", None) != "embedding_scale")),
    ),
    imported(
        "gemma2", "queries scaled by the width of their heads",
        "query_pre_attn_scalar is not read: scores are divided by the root of the head width.",
        ATTENTION, "attention_scale!",
        table("gemma2", 'Computed("query_pre_attn_scalar", "attention_scale", ...)', "",
              fields=without("query_pre_attn_scalar")),
    ),
    imported(
        "gemma2", "soft cap of the scores not read",
        "attn_logit_softcapping is not read.",
        ATTENTION, "attention_softcap!",
        table("gemma2", 'Same("attn_logit_softcapping", "attention_softcap")', "",
              fields=without("attn_logit_softcapping")),
    ),
    imported(
        "gemma2", "soft cap of the logits not read",
        "final_logit_softcapping is not read.",
        "model", "final_softcap!",
        table("gemma2", 'Same("final_logit_softcapping", "final_softcap")', "",
              fields=without("final_logit_softcapping")),
    ),
    imported(
        "gemma2", "norms behind and before a sublayer exchanged",
        "The norm behind attention has the scale of the norm before the MLP.",
        "block_0/attention_post_norm", "norms exchanged!",
        table("gemma2", '"post_attention_layernorm": "attention_post_norm", "pre_feedforward_layernorm": "mlp_norm"',
              '"post_attention_layernorm": "mlp_norm", "pre_feedforward_layernorm": "attention_post_norm"',
              block=lambda block: {**block, "post_attention_layernorm": "mlp_norm",
                                   "pre_feedforward_layernorm": "attention_post_norm"}),
    ),
    imported(
        "qwen3", "windows in the other layers",
        "The layers with full attention get the window, those with a window get none.",
        ATTENTION, "window!",
        edit(LayerTypes.read, "size if one == self.SLIDING else None", "None if one == self.SLIDING else size"),
    ),
    imported(
        "mistral", "window without the query's own key",
        "A window is read as one key less, as if it did not count the query itself.",
        ATTENTION, "window!",
        edit(Window.read, '"sliding_window", self.default)', '"sliding_window", self.default) - 1'),
    ),
    imported(
        "gemma3", "theta of the other layers",
        "Layers with a window have the base of those without, and the other way round.",
        ATTENTION, "rope_theta!",
        edit(LayeredRope.read, "[thetas[k] for k in types]",
             "[thetas[next(other for other in THETAS if other != k)] for k in types]"),
    ),
    imported(
        "gpt_neox", "the whole head rotated",
        "partial_rotary_factor is not read: RoPE turns all features of a head.",
        ATTENTION, "rotary_dim!",
        edit(rotary_dim, "return int(width * part)", "return None"),
    ),
    imported(
        "llama 3", "scaling of RoPE not read",
        "The scaling of Llama 3's frequencies is ignored.",
        ATTENTION, "rope_scaling!",
        edit(Rope.read, "**scaling}", "}"),
    ),
    imported(
        "llama 3", "scaling from the new context",
        "The ramp of Llama 3's scaling is placed by the extended context, not by the original one.",
        ATTENTION, "rope_original_len!",
        edit(_scaling, '["rope_original_len"] = original or inside', '["rope_original_len"] = length'),
    ),
    imported(
        "llama linear", "linear scaling the wrong way round",
        "Frequencies are multiplied by the factor that they should be divided by.",
        ATTENTION, "rope_factor!",
        edit(_scaling, 'float(number("factor", usual))', '1 / float(number("factor", usual))'),
    ),
    imported(
        "llama yarn", "yarn without its factor",
        "Rotated queries and keys are not multiplied by yarn's factor.",
        ATTENTION, "rope_attention_factor!",
        edit(_scaling, '_attention_factor(values["rope_factor"], options)',
             '_attention_factor(values["rope_factor"], options) or 1.0'),
    ),
    imported(
        "llama", "final norm read from the last layer",
        "The last norm has the scale of the last layer's.",
        "final_norm", "is block_2/mlp_norm/scale!",
        edit(hf.read_params, "    return params", '    return {**params, "final_norm": params["block_2"]["mlp_norm"]}'),
    ),
    imported(
        "gpt_neox", "parallel blocks read as sequential",
        "use_parallel_residual is not read: the MLP reads what attention has changed.",
        "block_0", "block_layout!",
        table("gpt_neox", "{True: 'parallel', False: 'sequential'}", "{True: 'sequential', False: 'sequential'}",
              fields=other("use_parallel_residual", Choice("use_parallel_residual", "block_layout", True,
                                                           dict.fromkeys((True, False), "sequential")))),
    ),
    imported(
        "granite", "residual multiplier not read",
        "residual_multiplier is ignored.",
        "block_0", "residual_scale!",
        table("granite", 'Same("residual_multiplier", "residual_scale")', "", fields=without("residual_multiplier")),
    ),
    imported(
        "granite", "logits multiplied, not divided",
        "logits_scaling multiplies the logits, though it divides them.",
        "model", "logit_divisor!",
        table("granite", 'Same("logits_scaling", "logit_divisor")', "1 / logits_scaling",
              fields=other("logits_scaling",
                           Computed("logits_scaling", "logit_divisor", lambda x: 1 / x, lambda cfg: 1.0))),
    ),
    imported(
        "qwen3", "norms of queries and keys exchanged",
        "Queries are normalised with the scale of the keys.",
        "block_0/attention/query_norm", "norms exchanged!",
        table("qwen3", '"self_attn.q_norm": "attention/query_norm"', '"self_attn.q_norm": "attention/key_norm"',
              block=lambda block: {**block, "self_attn.q_norm": "attention/key_norm",
                                   "self_attn.k_norm": "attention/query_norm"}),
    ),
    imported(
        "phi", "gelu_new read as gelu",
        "gelu_new, the approximation with tanh, is read as the exact form.",
        MLP, "activation = 'gelu_tanh'!",
        TableEdit(ACTIVATIONS, "gelu_new", "gelu", "jaxlm.convert.families.fields.ACTIVATIONS", ("gelu_tanh", "gelu")),
    ),
    imported(
        "gpt_neo", "scores of GPT-Neo scaled",
        "Scores are divided by the root of the head width, which GPT-Neo does not do.",
        ATTENTION, "attention_scale = 1.0!",
        table("gpt_neo", '"attention_scale": 1.0', '"attention_scale": None',
              always=lambda always: {**always, "attention_scale": None}),
    ),
    imported(
        "olmo2", "norms before the sublayers",
        "OLMo 2 normalises what a sublayer returns; it is imported with norms before the sublayers.",
        "block_0", "norm_order = 'reordered'!",
        table("olmo2", '"norm_order": "reordered"', '"norm_order": "pre"',
              always=lambda always: {**always, "norm_order": "pre"}),
    ),
    imported(
        "llama", "first and last layer exchanged",
        "The layers are numbered from the end.",
        "block_0/attention_norm", "layers in another order!",
        edit(Family._modules, "{self.layer.format(i)}.{name}", "{self.layer.format(cfg.num_layers - 1 - i)}.{name}"),
    ),
    imported(
        "llama", "weights rounded to bfloat16",
        "Weights lose digits on the way, though their type is wide.",
        "embedding", "rounded to bfloat16!",
        edit(Tensors.take, ".astype(self.dtype, copy=False)", ".astype(jnp.bfloat16).astype(self.dtype)"),
    ),
]  # fmt: skip
