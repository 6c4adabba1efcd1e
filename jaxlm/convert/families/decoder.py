"""What Llama and the families that descend from it have in common."""

from jaxlm.convert.families.fields import Rate, Same

SIZES = (
    Same("vocab_size"),
    Same("max_position_embeddings", "max_seq_len"),
    Same("num_hidden_layers", "num_layers"),
    Same("hidden_size", "embed_dim"),
    Same("num_attention_heads", "num_heads"),
)
GROUPS = Same("num_key_value_heads", "num_kv_heads", default=None)
HEAD_DIM = Same("head_dim", default=None)
MLP_DIM = Same("intermediate_size", "mlp_dim")
TIED = Same("tie_word_embeddings", "tie_embeddings", default=True)
UNTIED = Same("tie_word_embeddings", "tie_embeddings", default=False)
ATTENTION_DROPOUT = Rate("attention_dropout")
BIASES_OF_ATTENTION = Same("attention_bias", "qkv_bias", "attention_out_bias", default=False)

TOP = {"model.embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "head"}
LAYER = "model.layers.{}"
ATTENTION = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
}
QK_NORMS = {"self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm"}
MLP = {"mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up", "mlp.down_proj": "mlp/down"}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
FOUR_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
RMS = {"norm": "rmsnorm", "position": "rope", "use_bias": False, "init": "normal"}
