"""Llama 1 to 3.3, SmolLM, TinyLlama and others of the same type."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, Fixed, Same
from jaxlm.convert.families.rope import Rope

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
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
        Fixed("pretraining_tp", 1, None, written=False),
        Fixed("rope_interleaved", False, written=False),
        Fixed("sliding_window", None, written=False),
        Fixed("use_sliding_window", False, written=False),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.NORMS,
)
