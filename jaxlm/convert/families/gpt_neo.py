"""GPT-Neo and TinyStories: scores that are not scaled, and windows in every second layer."""

import itertools
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.convert.families.family import Family
from jaxlm.convert.families.fields import ACTIVATIONS, Choice, Dropouts, Same, scalar, shortest_period
from jaxlm.convert.foreign import Fields


class AttentionTypes:
    """`attention_types` [[[kind, ...], times], ...] gives the kinds of all layers; `window_size` is that of "local"."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        size, count = fields.optional("window_size", 256), fields.seen("num_layers", fields.seen("num_hidden_layers"))
        types = fields.optional("attention_types", [[["global", "local"], 12]])
        try:
            kinds = list(itertools.chain.from_iterable(list(names) * times for names, times in types))
        except (TypeError, ValueError):
            kinds = []
        kinds = fields.optional("attention_layers", kinds)  # the same, written out; transformers prefers it
        if not isinstance(kinds, list) or len(kinds) != count or any(one not in ("global", "local") for one in kinds):
            fields.refuse("attention_types", types, f"give global or local for each of the {count} layers")
        return {"window": scalar(shortest_period([size if kind == "local" else None for kind in kinds]))}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        windows = cfg.layer_windows
        size = next((window for window in windows if window is not None), 256)
        kinds = ["global" if window is None else "local" for window in windows]
        return {"attention_types": [[[kind], 1] for kind in kinds], "window_size": size, "attention_layers": kinds}


GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    always={"attention_scale": 1.0, "qkv_bias": False},
    fields=(
        Same("vocab_size"),
        Same("max_position_embeddings", "max_seq_len"),
        Same("num_layers", alias="num_hidden_layers"),
        Same("hidden_size", "embed_dim"),
        Same("num_heads", alias="num_attention_heads"),
        Same("intermediate_size", "mlp_dim", default=None),
        AttentionTypes(),
        Choice("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Same("layer_norm_epsilon", "norm_eps", default=1e-5),
        Same("tie_word_embeddings", "tie_embeddings", default=True),
        Dropouts("resid_dropout", "embed_dropout", "attention_dropout"),
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
        "attn.attention.q_proj": "attention/query",
        "attn.attention.k_proj": "attention/key",
        "attn.attention.v_proj": "attention/value",
        "attn.attention.out_proj": "attention/out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp/up",
        "mlp.c_proj": "mlp/down",
    },
    attention="attn",
    base="transformer.",
    buffers=r"attn\.attention\.(masked_)?bias",
    zero_biases=True,
)
