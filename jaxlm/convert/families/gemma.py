"""Gemma 1, 2 and the text model of Gemma 3."""

import math

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import GATES, Choice, Computed, Fixed, LayerTypes, Same
from jaxlm.convert.families.rope import LayeredRope, Rope

_ALWAYS = decoder.RMS | {"norm_unit_offset": True}
_TANH = {"gelu_pytorch_tanh": "geglu_tanh", **GATES}
_LEGACY = {"gelu_pytorch_tanh": "geglu_tanh", "gelu_python": "geglu", **GATES, "gelu": "geglu_tanh"}
"""Gemma 1's first releases say "gelu" and mean the tanh form; transformers reads them so."""
_SHARED = (
    *decoder.SIZES,
    Same("num_key_value_heads", "num_kv_heads", default=None),
    Same("head_dim", default=256),
    decoder.MLP_DIM,
    Same("rms_norm_eps", "norm_eps", default=1e-6),
    decoder.BIASES_OF_ATTENTION,
    decoder.TIED,
    decoder.ATTENTION_DROPOUT,
    Fixed("use_bidirectional_attention", None, False, written=False),
    Computed("hidden_size", "embedding_scale", math.sqrt, lambda cfg: cfg.embed_dim),
)
_LATER = (
    Choice("hidden_activation", "activation", "gelu_pytorch_tanh", _TANH),
    Computed(
        "query_pre_attn_scalar",
        "attention_scale",
        lambda scalar: scalar**-0.5,
        lambda cfg: cfg.resolved.head_dim if cfg.attention_scale is None else round(cfg.attention_scale**-2),
        default=256,
    ),
)

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    always=_ALWAYS,
    fields=(*_SHARED, Choice("hidden_act", "activation", "gelu_pytorch_tanh", _LEGACY), Rope()),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.NORMS,
)

_EVEN = LayerTypes(lambda i, _: i % 2 == 0, size=4096)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    always=_ALWAYS | {"norm_order": "sandwich"},
    fields=(
        *_SHARED,
        *_LATER,
        Same("attn_logit_softcapping", "attention_softcap", default=50.0),
        Same("final_logit_softcapping", "final_softcap", default=30.0),
        _EVEN,
        Rope(),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.MLP | decoder.FOUR_NORMS,
)

_FIVE_OF_SIX = LayerTypes(lambda i, every: (i + 1) % every != 0, name=("sliding_window_pattern", 6), size=4096)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    always=_ALWAYS | {"norm_order": "sandwich", "qk_norm": True},
    fields=(
        *_SHARED,
        *_LATER,
        Same("final_logit_softcapping", "final_softcap", default=None),  # transformers does not cap the scores
        _FIVE_OF_SIX,
        LayeredRope(_FIVE_OF_SIX),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block=decoder.ATTENTION | decoder.QK_NORMS | decoder.MLP | decoder.FOUR_NORMS,
)
