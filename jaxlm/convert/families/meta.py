"""The names of Llama's tensors in Meta's format and in llama2.c; their configs are read in convert/meta.py."""

from jaxlm.convert.families.family import Family

META = Family(
    model_type="meta",
    architecture="Transformer",
    always={},
    fields=(),
    top={"tok_embeddings": "embedding", "norm": "final_norm", "output": "head"},
    layer="layers.{}",
    block={
        "attention_norm": "attention_norm",
        "attention.wq": "attention/query",
        "attention.wk": "attention/key",
        "attention.wv": "attention/value",
        "attention.wo": "attention/out",
        "ffn_norm": "mlp_norm",
        "feed_forward.w1": "mlp/gate",
        "feed_forward.w2": "mlp/down",
        "feed_forward.w3": "mlp/up",
    },
    attention="attention",
    mlp="feed_forward",
    base="",
    buffers=r"rope\.freqs|freqs_(cos|sin|cis)|attention\.mask",
)
