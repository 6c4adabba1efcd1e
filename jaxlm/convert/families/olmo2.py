"""OLMo 2: norms after each sublayer, and over all queries and all keys together."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, Same
from jaxlm.convert.families.rope import Rope

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    always=decoder.RMS | {"norm_order": "reordered", "qk_norm": True, "qk_norm_over": "projection"},
    fields=(
        *decoder.SIZES,
        decoder.GROUPS,
        decoder.HEAD_DIM,
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "silu", GATES),
        Same("rms_norm_eps", "norm_eps", default=1e-5),
        decoder.BIASES_OF_ATTENTION,
        decoder.UNTIED,
        decoder.ATTENTION_DROPOUT,
        Rope(),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION
    | decoder.QK_NORMS
    | decoder.MLP
    | {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"},
)
