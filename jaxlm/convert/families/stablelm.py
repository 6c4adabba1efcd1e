"""StableLM: layer norms, a gated MLP, RoPE over a part of each head, parallel or not."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, Dropouts, Fixed, HeadWidth, Same
from jaxlm.convert.families.rope import Rope

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    always={"norm": "layernorm", "norm_bias": True, "use_bias": False, "position": "rope", "init": "normal"},
    fields=(
        *decoder.SIZES,
        decoder.GROUPS,
        HeadWidth(),
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "silu", GATES),
        Same("layer_norm_eps", "norm_eps", default=1e-5),
        Same("use_qkv_bias", "qkv_bias", default=False),
        Fixed("qk_layernorm", False),
        Choice("use_parallel_residual", "block_layout", False, {False: "sequential", True: "parallel_one_norm"}),
        decoder.UNTIED,
        Dropouts("hidden_dropout", None, "attention_dropout"),
        Rope(part=0.25),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.NORMS,
    zero_biases=True,
)
