"""GPT-NeoX and Pythia: parallel blocks, RoPE over a part of each head, queries, keys and values head by head."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import QKV, Family
from jaxlm.convert.families.fields import ACTIVATIONS, Choice, Dropouts, HeadWidth, Same
from jaxlm.convert.families.rope import Rope

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    always={"position": "rope", "init": "normal"},
    fields=(
        *decoder.SIZES,
        HeadWidth(),
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "gelu", {"gelu": "gelu", **ACTIVATIONS}),
        Same("layer_norm_eps", "norm_eps", default=1e-5),
        Same("attention_bias", "qkv_bias", "attention_out_bias", default=True),
        Choice("use_parallel_residual", "block_layout", True, {True: "parallel", False: "sequential"}),
        decoder.UNTIED,
        Dropouts("hidden_dropout", None, "attention_dropout"),
        Rope(part=0.25, older=("rotary_emb_base", "rotary_pct")),
    ),
    top={
        "gpt_neox.embed_in": "embedding",
        "gpt_neox.final_layer_norm": "final_norm",
        "embed_out": "head",
    },
    layer="gpt_neox.layers.{}",
    block={
        "input_layernorm": "attention_norm",
        "attention.query_key_value": QKV,
        "attention.dense": "attention/out",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp/up",
        "mlp.dense_4h_to_h": "mlp/down",
    },
    attention="attention",
    base="gpt_neox.",
    by_heads=True,
    buffers=r"attention\.(masked_)?bias|rotary_emb\.inv_freq",
    renamed={"lm_head": "embed_out"},
    zero_biases=True,
)
