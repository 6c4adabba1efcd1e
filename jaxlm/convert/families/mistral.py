"""Mistral: Llama with a sliding window."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, Same, Window
from jaxlm.convert.families.rope import Rope

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    always=decoder.RMS,
    fields=(
        *decoder.SIZES,
        decoder.GROUPS,
        decoder.HEAD_DIM,
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "silu", GATES),
        Same("rms_norm_eps", "norm_eps", default=1e-6),
        decoder.UNTIED,
        decoder.ATTENTION_DROPOUT,
        Rope(),
        Window(),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.NORMS,
)
