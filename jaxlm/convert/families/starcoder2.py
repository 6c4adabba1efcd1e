"""StarCoder 2: layer norms, an MLP without a gate, a sliding window."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import ACTIVATIONS, Choice, Dropouts, Same, Window
from jaxlm.convert.families.rope import Rope

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    always={"norm": "layernorm", "norm_bias": True, "position": "rope", "init": "normal"},
    fields=(
        *decoder.SIZES,
        Same("num_key_value_heads", "num_kv_heads", default=2),
        decoder.HEAD_DIM,
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}),
        Same("norm_epsilon", "norm_eps", default=1e-5),
        Same("use_bias", "use_bias", "qkv_bias", "attention_out_bias", default=True),
        decoder.TIED,
        Dropouts("residual_dropout", "embedding_dropout", "attention_dropout"),
        Rope(),
        Window(),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.NORMS | {"mlp.c_fc": "mlp/up", "mlp.c_proj": "mlp/down"},
    zero_biases=True,
)
