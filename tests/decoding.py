"""The model, prompts and arguments that the tests of decoding share."""

import jax
from support import built, random_tokens

from jaxlm.config import ModelConfig
from jaxlm.decode.generate import generate

CFG = ModelConfig(
    vocab_size=11, max_seq_len=24, num_layers=2, embed_dim=12, num_heads=3, num_kv_heads=1, position="rope"
)
KEY = jax.random.key(7)
PROMPT = random_tokens(CFG, 2, 5)


def sampled(prompt, **arguments):
    """`generate` of 9 tokens by the model of CFG, unless arguments say otherwise."""
    model, params = built(CFG)
    return generate(model, params, prompt, **{"max_new_tokens": 9, "key": KEY, **arguments})
