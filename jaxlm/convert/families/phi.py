"""Phi 1, 1.5 and 2 (parallel blocks with one norm), and Phi 3 (fused projections)."""

from jaxlm.convert.families import decoder
from jaxlm.convert.families.family import QKV, Family
from jaxlm.convert.families.fields import ACTIVATIONS, GATES, Choice, Dropouts, Fixed, Same, Window
from jaxlm.convert.families.rope import Rope

PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    always={"block_layout": "parallel_one_norm", "position": "rope", "head_bias": True, "init": "normal"},
    fields=(
        *decoder.SIZES,
        decoder.GROUPS,
        Same("head_dim", default=None),
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "gelu_new", ACTIVATIONS),
        Same("layer_norm_eps", "norm_eps", default=1e-5),
        Fixed("qk_layernorm", False),
        decoder.UNTIED,
        Dropouts("resid_pdrop", "embd_pdrop", "attention_dropout"),
        Rope(part=0.5),
    ),
    top={"model.embed_tokens": "embedding", "model.final_layernorm": "final_norm", "lm_head": "head"},
    layer=decoder.LAYER,
    block={
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.dense": "attention/out",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
        "input_layernorm": "attention_norm",
    },
    zero_biases=True,
)
PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    always=decoder.RMS,
    fields=(
        *decoder.SIZES,
        decoder.GROUPS,
        decoder.HEAD_DIM,
        decoder.MLP_DIM,
        Choice("hidden_act", "activation", "silu", GATES),
        Same("rms_norm_eps", "norm_eps", default=1e-5),
        decoder.UNTIED,
        Dropouts("resid_pdrop", "embd_pdrop", "attention_dropout"),
        Rope(part=1.0, kinds=("default",)),
        Window(),
    ),
    top=decoder.TOP,
    layer=decoder.LAYER,
    block={
        "self_attn.qkv_proj": QKV,
        "self_attn.o_proj": "attention/out",
        "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
        "mlp.down_proj": "mlp/down",
        **decoder.NORMS,
    },
)
