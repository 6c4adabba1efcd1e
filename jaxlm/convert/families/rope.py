"""`rope_parameters` of config.json, and the older entries with the same meaning."""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.convert.families.fields import LayerTypes, scalar, shortest_period
from jaxlm.convert.foreign import Fields

KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
"""Types of RoPE in transformers and here. dynamic and longrope change their frequencies with the length of the text."""


class Rope:
    """RoPE's base, the rotated part of each head and the scaling for long contexts, the same in all layers.

    transformers 5 keeps them in rope_parameters; before, the base was an entry of its own beside rope_scaling.

    Args:
      theta: the base where none is given.
      part: the part of each head that is rotated where none is given; None = the family rotates whole heads.
      older: the older names of base and part.
      kinds: the types of scaling that the family's code has.
    """

    def __init__(
        self,
        theta: float = 10000.0,
        part: float | None = None,
        older: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
        kinds: tuple[str, ...] = tuple(KINDS),
    ) -> None:
        self.theta, self.part, self.older, self.kinds = theta, part, older, kinds

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        theta, part = (fields.optional(name, None) for name in self.older)
        original = fields.optional("original_max_position_embeddings", None)
        options = _options(fields)
        theta = _agreed(fields, options, "rope_theta", theta, self.theta)
        part = _agreed(fields, options, "partial_rotary_factor", part, self.part or 1.0)
        if self.part is None and part != 1:
            fields.refuse("rope_parameters.partial_rotary_factor", part, "transformers rotates whole heads here")
        length = fields.seen("max_position_embeddings")
        kind = options.get("rope_type") or options.get("type")
        if kind in KINDS and kind not in self.kinds:
            fields.refuse("rope_parameters.rope_type", kind, f"in this family it is one of {', '.join(self.kinds)}")
        scaling = _scaling(fields, "rope_parameters", dict(options), length, original)
        return {"rope_theta": theta, "rotary_dim": rotary_dim(fields, part), **scaling}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        layer = cfg.layer_settings[0]
        width = cfg.rotary_dim or cfg.resolved.head_dim
        whole = self.part is None and width == cfg.resolved.head_dim
        part = {} if whole else {"partial_rotary_factor": _part(cfg, width)}
        written = {"rope_theta": layer.rope_theta, **part, **write_scaling(cfg, layer.rope_factor)}
        older = {self.older[0]: layer.rope_theta} | ({self.older[1]: part["partial_rotary_factor"]} if part else {})
        return {"rope_parameters": written, **older}


THETAS = {"full_attention": ("rope_theta", 1_000_000.0), "sliding_attention": ("rope_local_base_freq", 10_000.0)}
"""Gemma 3's older name of each base, and its default."""


class LayeredRope:
    """RoPE with one set of parameters for the layers with a window and another for those without (Gemma 3)."""

    def __init__(self, layer_types: LayerTypes) -> None:
        self.layer_types = layer_types

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        older = {kind: fields.optional(name, None) for kind, (name, _) in THETAS.items()}
        nested = fields.optional("rope_parameters", None) or {}
        scaling = fields.optional("rope_scaling", None)
        if not isinstance(nested, Mapping) or not set(nested) <= set(THETAS):
            fields.refuse("rope_parameters", nested, f"give an object for each of {', '.join(THETAS)}")
        length, found, thetas = fields.seen("max_position_embeddings"), {}, {}
        for kind, (_, default) in THETAS.items():
            options = dict(nested.get(kind) or {})
            if kind == "full_attention" and isinstance(scaling, Mapping):
                options |= scaling
            thetas[kind] = _agreed(fields, options, "rope_theta", older[kind], default)
            found[kind] = _scaling(fields, f"rope_parameters.{kind}", options, length, None)
        scaled = [one for one in found.values() if one]
        if len(scaled) == 2 and any(scaled[0].get(k) != scaled[1].get(k) for k in scaled[0] if k != "rope_factor"):
            fields.refuse("rope_parameters", nested, "jaxlm has one kind of scaling for all layers, with a factor each")
        types = self.layer_types.types(fields)
        factors = [found[kind].get("rope_factor", 1.0) for kind in types]
        values = {**(scaled[0] if scaled else {}), "rope_theta": scalar(shortest_period([thetas[k] for k in types]))}
        return values | ({"rope_factor": scalar(shortest_period(factors))} if scaled else {})

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        written = {kind: {"rope_type": "default", "rope_theta": theta} for kind, (_, theta) in THETAS.items()}
        for layer in cfg.layer_settings:
            kind = "full_attention" if layer.window is None else "sliding_attention"
            written[kind] = {"rope_theta": layer.rope_theta, **write_scaling(cfg, layer.rope_factor)}
        return {"rope_parameters": written}


def rotary_dim(fields: Fields, part: Any) -> int | None:
    """The number of rotated features, as transformers rounds it; None = all."""
    if part == 1:
        return None
    width = fields.seen("head_dim")
    if width is None:
        model, heads = fields.seen("hidden_size"), fields.seen("num_attention_heads")
        if not all(isinstance(size, int) and size > 0 for size in (model, heads)):
            fields.refuse("num_attention_heads", heads, "give a whole number above 0, and hidden_size too")
        width = model // heads
    if isinstance(part, bool) or not isinstance(part, float | int) or not 0 < part <= 1:
        fields.refuse("partial_rotary_factor", part, "give a number above 0 up to 1")
    return int(width * part)


def write_scaling(cfg: ModelConfig, factor: float) -> dict[str, Any]:
    """The entries of rope_parameters that describe the scaling of a layer."""
    if cfg.rope_scaling == "none" or factor == 1:
        return {"rope_type": "default"}
    entries: dict[str, Any] = {"rope_type": cfg.rope_scaling, "factor": factor}
    if cfg.rope_scaling == "linear":
        return entries
    entries["original_max_position_embeddings"] = cfg.rope_original_len or cfg.max_seq_len
    slow, fast = cfg.rope_ramp or ((1.0, 4.0) if cfg.rope_scaling == "llama3" else (1.0, 32.0))
    if cfg.rope_scaling == "llama3":
        return entries | {"low_freq_factor": slow, "high_freq_factor": fast}
    given = {} if cfg.rope_attention_factor is None else {"attention_factor": cfg.rope_attention_factor}
    return entries | {"beta_slow": slow, "beta_fast": fast, **given}


def _options(fields: Fields) -> dict[str, Any]:
    """The object that transformers reads: rope_scaling takes the place of rope_parameters where both are given."""
    options = None
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.optional(name, None)
        if value is not None and not isinstance(value, Mapping):
            fields.refuse(name, value, "give an object")
        options = value or options
    return dict(options or {})


def _agreed(fields: Fields, options: dict[str, Any], name: str, older: Any, default: float) -> Any:
    """Takes an entry that may stand in rope_parameters or beside it; two that differ are refused."""
    value = options.pop(name, None)
    if value is not None and older is not None and value != older:
        fields.refuse(f"rope_parameters.{name}", value, f"beside it stands {older!r}: make them equal")
    found = value if value is not None else older
    return default if found is None else found


def _scaling(fields: Fields, where: str, options: dict[str, Any], length: Any, original: Any) -> dict[str, Any]:
    """The fields of ModelConfig for the scaling that `options` describes; every entry is used or refused."""
    older_name = options.pop("type", None)
    kind = options.pop("rope_type", None) or older_name or "default"
    if kind not in KINDS:
        hint = (
            "its frequencies depend on the length of the text" if kind in ("dynamic", "longrope", "su") else "unknown"
        )
        fields.refuse(f"{where}.rope_type", kind, f"jaxlm has {', '.join(KINDS)} ({hint})")

    def number(name: str, default: Any = None) -> Any:
        value = options.pop(name, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, float | int):
            fields.refuse(f"{where}.{name}", value, f"{kind} needs a number")
        return value

    values: dict[str, Any] = {}
    if kind in ("llama3", "yarn"):
        inside = number("original_max_position_embeddings", original or length)
        values["rope_original_len"] = original or inside
    if kind != "default":
        usual = length / values["rope_original_len"] if kind == "yarn" and isinstance(length, int) else None
        values |= {"rope_scaling": KINDS[kind], "rope_factor": float(number("factor", usual))}
    if kind == "llama3":
        values["rope_ramp"] = (float(number("low_freq_factor")), float(number("high_freq_factor")))
    if kind == "yarn":
        values["rope_ramp"] = (float(number("beta_slow", 1) or 1), float(number("beta_fast", 32) or 32))
        values["rope_attention_factor"] = _attention_factor(values["rope_factor"], options)
        if values["rope_factor"] == 1 and values["rope_attention_factor"] not in (None, 1.0):
            fields.refuse(f"{where}.attention_factor", values["rope_attention_factor"], "with factor = 1 give 1")
        if options.pop("truncate", True) is not True:
            fields.refuse(f"{where}.truncate", False, "jaxlm's ramp begins and ends at whole numbers")
    if kind == "default":
        options.pop("factor", None)  # which transformers does not read then
        options.pop("original_max_position_embeddings", None)
    for name, value in options.items():
        if value is not None:
            fields.refuse(f"{where}.{name}", value, f"jaxlm does not know it for rope_type = {kind!r}")
    return values


def _attention_factor(factor: float, options: dict[str, Any]) -> float | None:
    """What yarn multiplies by: given, or by two coefficients of the logarithm, or (None) the usual."""
    given, mscale, all_dims = (options.pop(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (mscale and all_dims):
        return given
    of_each = [1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1 for scale in (mscale, all_dims)]
    return of_each[0] / of_each[1]


def _part(cfg: ModelConfig, width: int) -> float:
    """The part of a head whose width, rounded down, is `width`."""
    part = width / cfg.resolved.head_dim
    return part if int(cfg.resolved.head_dim * part) == width else math.nextafter(part, 1.0)
