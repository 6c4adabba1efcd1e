"""Which family can hold a model, found by writing its config and reading that back."""

import dataclasses
import math
from typing import Any, NamedTuple

from jaxlm.config import ModelConfig
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import resolved
from jaxlm.convert.foreign import Fields
from jaxlm.errors import UserError

FREE = {
    *("dtype", "param_dtype", "attention_impl", "scan_layers", "remat", "init", "rope_layout"),
    *("dropout", "attention_dropout", "embedding_dropout", "window", "rope_theta", "rope_factor"),
}
"""Fields that do not change the function, or only the order of the parameters, or that `meaning` gives by layer."""
BIASES = ("use_bias", "qkv_bias", "attention_out_bias", "norm_bias", "head_bias")
SHOWN = 3
"""A refusal names at most so many fields."""


class Held(NamedTuple):
    """A family that holds a model."""

    family: Family
    cfg: ModelConfig
    """The model as the family has it: maybe with more biases, which are zero."""
    config: dict[str, Any]
    """Its config.json."""


def holding(cfg: ModelConfig, families: list[Family]) -> Held:
    """The first of the families that can hold the model.

    Raises:
      UserError: none can; the message names the fields in which the nearest differs.
    """
    nearest: tuple[int, str] = (len(dataclasses.fields(cfg)), "no family has it")
    for family in families:
        config = family.write_config(cfg)
        fields = Fields(config, family.model_type)
        try:
            held = ModelConfig(**family.read_config(fields), dtype=cfg.dtype, param_dtype=cfg.param_dtype)
        except UserError as error:
            nearest = min(nearest, (SHOWN + 1, f"the nearest, {family.model_type}, cannot: {error}"))
            continue
        ours, theirs = meaning(cfg), meaning(held)
        differ = [name for name in ours if not _same(ours[name], theirs[name])]
        if ours["mlp_dim"] == 0:  # which a config can say, but no family's code
            raise UserError("mlp_dim = 0: every family of Hugging Face has an MLP in each layer; give the model one")
        differ = [name for name in differ if not (family.zero_biases and name in BIASES and theirs[name])]
        if not differ:
            return Held(family, held, config)
        words = ", ".join(f"{name} = {theirs[name]!r} and not {ours[name]!r}" for name in differ[:SHOWN])
        nearest = min(nearest, (len(differ), f"the nearest, {family.model_type}, has {words}"))
    raise UserError(f"no model of Hugging Face or nanoGPT computes this one: {nearest[1]}; change the model")


def meaning(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes, as the values they stand for: equal for equal functions."""
    values = {field.name: resolved(cfg, field.name) for field in dataclasses.fields(cfg) if field.name not in FREE}
    layers = cfg.layer_settings if cfg.family == "transformer" else ()
    values["window"] = tuple(layer.window for layer in layers)
    values["attention_scale"] = cfg.attention_scale or cfg.resolved.head_dim**-0.5
    values["norm_bias"] = cfg.norm == "layernorm" and values["norm_bias"]
    values["rotary_dim"] = cfg.rotary_dim or cfg.resolved.head_dim
    scaled = cfg.rope_scaling != "none" and any(layer.rope_factor != 1 for layer in layers)
    values["rope_theta"] = tuple(layer.rope_theta for layer in layers)
    values["rope_factor"] = tuple(layer.rope_factor for layer in layers) if scaled else ()
    values["rope_original_len"] = cfg.rope_original_len or cfg.max_seq_len
    values["rope_ramp"] = cfg.rope_ramp or {"llama3": (1, 4), "yarn": (1, 32)}.get(cfg.rope_scaling)
    if not scaled:
        values["rope_scaling"] = "none"
    if not scaled or cfg.rope_scaling == "linear":
        values["rope_original_len"] = values["rope_ramp"] = None
    if not scaled or cfg.rope_scaling != "yarn":
        values["rope_attention_factor"] = None
    if cfg.position != "rope":
        values |= {name: None for name in values if name.startswith("rope_") or name == "rotary_dim"}
    return values


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float | int):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    return ours == theirs
