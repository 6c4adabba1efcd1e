"""Qwen 2 and 2.5 (biases in queries, keys and values) and Qwen 3 (norms of queries and keys)."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, LayerTypes, Same
from jaxlm.convert.families.rope import Rope

_SHARED = (
    *decoder.SIZES,
    decoder.GROUPS,
    decoder.MLP_DIM,
    Choice("hidden_act", "activation", "silu", GATES),
    Same("rms_norm_eps", "norm_eps", default=1e-6),
    decoder.UNTIED,
    decoder.ATTENTION_DROPOUT,
    Rope(),
    LayerTypes(lambda i, first: i >= first, name=("max_window_layers", 28), size=4096, used="use_sliding_window"),
)
_BLOCK = decoder.ATTENTION | decoder.MLP | decoder.NORMS

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    always=decoder.RMS | {"qkv_bias": True},
    fields=(*_SHARED, decoder.HEAD_DIM),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=_BLOCK,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    always=decoder.RMS | {"qk_norm": True},
    fields=(*_SHARED, decoder.BIASES_OF_ATTENTION, Same("head_dim", default=128)),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=_BLOCK | decoder.QK_NORMS,
)
