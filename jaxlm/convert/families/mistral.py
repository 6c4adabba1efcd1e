"""Mistral: Llama with a sliding window, in all layers or (Ministral) in some."""

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, LayerTypes, Same, Window
from jaxlm.convert.families.rope import Rope
from jaxlm.convert.foreign import Fields


class Windows:
    """`sliding_window`, in the layers that `layer_types` names if it is there: transformers reads it as Ministral's."""

    BY_LAYER, IN_ALL = LayerTypes(lambda i, _: True, size=4096), Window(4096)

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        return (self.IN_ALL if fields.seen("layer_types") is None else self.BY_LAYER).read(fields)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return self.IN_ALL.write(cfg)


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    always=decoder.RMS,
    fields=(
        *decoder.SIZES,
        Same("num_key_value_heads", "num_kv_heads", default=8),
        decoder.HEAD_DIM,
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "silu", GATES),
        Same("rms_norm_eps", "norm_eps", default=1e-6),
        decoder.UNTIED,
        decoder.ATTENTION_DROPOUT,
        Rope(),
        Windows(),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.NORMS,
)
MINISTRAL = dataclasses.replace(
    MISTRAL,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    fields=(*MISTRAL.fields[:-1], Windows.BY_LAYER),
)
