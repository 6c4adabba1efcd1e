"""Dropout: its place, its scaling, and the masks that are drawn."""

from typing import Any

from jaxlm.model import layer_stack, transformer
from jaxlm.model.layers import Dropout, LanguageModel
from jaxlm.ops import attention, dropout
from planted.bugs import FLOAT64, GROUPED, Bug, Edit, edit

ATTENTION = "block_0/attention"
RATES: dict[str, Any] = {"dropout": 0.3, "attention_dropout": 0.4, "embedding_dropout": 0.25}


def dropped(quantity: str, name: str, what: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Bug:
    """A bug of dropout."""
    return Bug(name, what, layer, cause, edits, FLOAT64 | GROUPED | RATES | fields, check="dropout", quantity=quantity)


BUGS = [
    dropped(
        "training", "kept entries not rescaled",
        "Dropout does not divide the entries that it keeps by 1 - rate.",
        "embedding", "not divided by 1 - rate!",
        edit(Dropout.__call__, "x / (1 - self.rate)", "x"),
    ),
    dropped(
        "training", "kept entries divided by the rate",
        "Dropout divides the entries that it keeps by the rate.",
        "embedding", "divided by the rate!",
        edit(Dropout.__call__, "x / (1 - self.rate)", "x / self.rate"),
    ),
    dropped(
        "evaluation", "dropout in evaluation",
        "Dropout acts in evaluation too.",
        "embedding", "applied in evaluation",
        edit(Dropout.__call__, "not train or not self.rate", "not self.rate"),
    ),
    dropped(
        "training", "no dropout of the embedding sum",
        "The sum of embedding and position vector is not dropped.",
        "embedding", "dropout forgotten!",
        edit(transformer.Transformer.__call__, "x = Dropout(cfg.dropout)(x, train)", "Dropout(cfg.dropout)(x, train)"),
    ),
    dropped(
        "training", "dropout after the residual sum",
        "A sublayer drops entries of the residual stream, not of its own output.",
        "block_0", "before or after the residual sum",
        edit(transformer.Block.__call__, "            out = Dropout(cfg.dropout)(out, train)\n", "",
             "out = x + out if cfg.residual else out", "out = Dropout(cfg.dropout)(x + out, train)"),
    ),
    dropped(
        "training", "attention dropout before the softmax",
        "Attention dropout zeroes scores, not weights.",
        ATTENTION, "before or after the softmax",
        edit(attention._read_forward, "masked_softmax(scores, mask)",
             "masked_softmax(_dropped(scores, kept, rate), mask)",
             "_split(_dropped(weights, kept, rate), values)", "_split(weights, values)"),
    ),
    dropped(
        "training", "attention weights not rescaled",
        "The attention weights that are kept are not divided by 1 - rate.",
        ATTENTION, "not divided by 1 - rate!",
        edit(attention._dropped, "weights / (1 - rate)", "weights"),
    ),
    dropped(
        "gradient", "derivative of attention without its mask",
        "The derivative of attention, written by hand, forgets which weights were dropped.",
        "block_1/attention/*", "forgets the mask",
        edit(attention._read_backward, "jnp.concatenate(d_parts, axis=-1), kept, rate)",
             "jnp.concatenate(d_parts, axis=-1), None, rate)"),
    ),
    dropped(
        "training", "embedding dropout of entries",
        "Embedding dropout zeroes single entries of the table, not whole words.",
        "embedding", "drops words, not entries",
        edit(LanguageModel._embed, "(cfg.vocab_size, 1)", "(cfg.vocab_size, cfg.embed_dim)"),
    ),
    dropped(
        "training", "one mask for all rows",
        "All rows of a batch drop the same entries.",
        "embedding", "before or after",
        edit(Dropout.__call__, "self.rate, x.shape", "self.rate, (1, *x.shape[1:])"),
    ),
    dropped(
        "mask", "rate and 1 - rate exchanged",
        "An entry is kept with probability rate.",
        "embedding", "exchanged!",
        edit(dropout.draw_kept, "(1 - rate) * 2**16", "rate * 2**16"),
    ),
    dropped(
        "mask", "one mask for all layers",
        "Every layer draws with the same key.",
        "block_0/attention", "one mask for embedding and block_0/attention!",
        edit(Dropout.__call__, 'self.make_rng("dropout")', "jax.random.key(0)"),
    ),
    dropped(
        "mask", "one mask for all scanned layers",
        "The scan over layers gives each of them the same key.",
        "block_1/attention", "one mask for block_0/attention and block_1/attention!",
        edit(layer_stack.apply_layers, '"dropout": True', '"dropout": False'), scan_layers=True,
    ),
    dropped(
        "mask", "random bits used twice",
        "Of each random word the lower half is used twice, the upper half never.",
        "embedding", "one mask for features 8 apart!",
        edit(dropout.draw_kept, "words >> 16", "words & 0xFFFF"),
    ),
]  # fmt: skip
