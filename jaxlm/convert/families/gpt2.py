"""GPT-2, whose linear layers are "Conv1D" with weights (in, out); nanoGPT has the same names with (out, in)."""

import dataclasses

from jaxlm.convert.families.family import QKV, Family
from jaxlm.convert.families.fields import ACTIVATIONS, Choice, Dropouts, Fixed, Same

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    always={},
    fields=(
        Same("vocab_size"),
        Same("n_positions", "max_seq_len", alias="max_position_embeddings"),
        Same("n_layer", "num_layers", alias="num_hidden_layers"),
        Same("n_embd", "embed_dim", alias="hidden_size"),
        Same("n_head", "num_heads", alias="num_attention_heads"),
        Same("n_inner", "mlp_dim", default=None),
        Choice("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Same("layer_norm_epsilon", "norm_eps", default=1e-5),
        Same("tie_word_embeddings", "tie_embeddings", default=True),
        Dropouts("resid_pdrop", "embd_pdrop", "attn_pdrop", default=0.1),
        Choice("scale_attn_weights", "attention_scale", True, {True: None, False: 1.0}),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("reorder_and_upcast_attn", False, True),  # the same function, rounded otherwise
        Fixed("add_cross_attention", False, written=False),
    ),
    top={
        "transformer.wte": "embedding",
        "transformer.wpe": "position_embedding",
        "transformer.ln_f": "final_norm",
        "lm_head": "head",
    },
    layer="transformer.h.{}",
    block={
        "ln_1": "attention_norm",
        "attn.c_attn": QKV,
        "attn.c_proj": "attention/out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp/up",
        "mlp.c_proj": "mlp/down",
    },
    attention="attn",
    base="transformer.",
    plain=(".c_",),
    buffers=r"h\.\d+\.attn\.(masked_)?bias",
    zero_biases=True,
)
NANOGPT = dataclasses.replace(
    GPT2,
    model_type="nanogpt",
    architecture="GPT",
    fields=(
        Same("vocab_size"),
        Same("block_size", "max_seq_len"),
        Same("n_layer", "num_layers"),
        Same("n_embd", "embed_dim"),
        Same("n_head", "num_heads"),
        Same("bias", "use_bias"),
        Same("dropout", "dropout", "attention_dropout", default=0.0),
    ),
    plain=(),
    zero_biases=False,
)
"""nanoGPT, whose config is `model_args`."""
