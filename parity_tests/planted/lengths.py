"""Rows of several lengths in one batch: padding seen, cached, or counted in the positions."""

from typing import Any

from jaxlm.decode.prefill import start
from jaxlm.model import transformer
from jaxlm.model.recurrent import RecurrentLayer
from jaxlm.ops import masks
from planted.bugs import FLOAT64, GRU, ROPE, Bug, Edit, edit

ATTENTION = "block_0/attention"


def padded(name: str, what: str, layer: str, cause: str, *edits: Edit, quantity: str = "padding", **fields: Any) -> Bug:
    """A bug that shows where rows are padded."""
    fields = ROPE | FLOAT64 | {"num_layers": 1} | fields
    return Bug(name, what, layer, cause, edits, fields, check="padding", quantity=quantity)


BUGS = [
    padded(
        "mask that shows padding",
        "A query sees the keys of padding, whose position is -1.",
        ATTENTION, "padding seen",
        edit(masks.attention_mask, "(key >= 0) & (key <= query)", "key <= query"),
    ),
    padded(
        "lengths not read",
        "The model does not read the lengths: padding is cached as tokens.",
        ATTENTION, "lengths ignored!",
        edit(transformer.Transformer.__call__, "if lengths is not None", "if False"),
    ),
    padded(
        "next position behind the padding",
        "After a padded row the next token's position counts the padding.",
        ATTENTION, "positions that count padding!",
        edit(transformer.Transformer.__call__, "next_position=past + added", "next_position=past + length"),
    ),
    padded(
        "padding cached at positions of its own",
        "Padding gets the positions after the row's last token and is cached there, where a later chunk sees it.",
        ATTENTION, "padding written to the cache",
        edit(transformer.Transformer.__call__, "jnp.where(offsets < added[:, None], positions, -1)", "positions"),
    ),
    padded(
        "first token of padding taken as real",
        "A row counts as one token longer than it is.",
        ATTENTION, "lengths off by one",
        edit(transformer.Transformer.__call__, "offsets < added[:, None]", "offsets <= added[:, None]"),
    ),
    padded(
        "last real token taken as padding",
        "A row counts as one token shorter than it is.",
        ATTENTION, "lengths off by one",
        edit(transformer.Transformer.__call__, "offsets < added[:, None]", "offsets < added[:, None] - 1"),
    ),
    padded(
        "recurrent state that reads the padding",
        "The state of a recurrent layer goes on through the padding.",
        "block_0", "lengths ignored!",
        edit(RecurrentLayer.__call__, "jnp.where(real, a, b)", "a"),
        position="learned", **GRU,
    ),
    padded(
        "last token of a prompt taken from the last column",
        "Sampling begins with the last column of the prompts, which is padding in the shorter ones.",
        "model", "last column",
        edit(start, "ids[np.arange(len(ids)), fed]", "ids[:, -1]"), quantity="decoding",
    ),
    padded(
        "prompts cached to the longest one's end",
        "The padding of the shorter prompts is cached as if it were part of them.",
        "model", "padding written to the cache",
        edit(start, "np.clip(fed - begin, 0, width)", "np.clip(fed.max() - begin + 0 * fed, 0, width)"),
        quantity="decoding",
    ),
]  # fmt: skip
