"""Granite: Llama with four multipliers."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, Same
from jaxlm.convert.families.rope import Rope

GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    always=decoder.RMS,
    fields=(
        *decoder.SIZES,
        decoder.GROUPS,
        decoder.HEAD_DIM,
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "silu", GATES),
        Same("rms_norm_eps", "norm_eps", default=1e-6),
        decoder.BIASES_OF_ATTENTION,
        Same("mlp_bias", "use_bias", default=False),
        decoder.UNTIED,
        decoder.ATTENTION_DROPOUT,
        Rope(),
        Same("embedding_multiplier", "embedding_scale", default=1.0),
        Same("residual_multiplier", "residual_scale", default=1.0),
        Same("attention_multiplier", "attention_scale", default=1.0),
        Same("logits_scaling", "logit_divisor", default=1.0),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.NORMS,
)
