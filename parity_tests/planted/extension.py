"""Going on from other weights: longer and shorter position tables, stacked layers, fields that change in silence."""

from typing import Any

from jaxlm.model import layer_stack
from jaxlm.run import init_from
from planted.bugs import FLOAT64, Bug, Edit, edit


def extended(
    changes: dict[str, Any], name: str, what: str, layer: str, cause: str, *edits: Edit, quantity: str = "parameter",
    **fields: Any,
) -> Bug:  # fmt: skip
    """A bug that shows when a model goes on with some fields changed."""
    options = (("changes", tuple(changes.items())),)
    return Bug(name, what, layer, cause, edits, FLOAT64 | fields, "extension", quantity=quantity, options=options)


LONGER, SHORTER, SCANNED = {"max_seq_len": 24}, {"max_seq_len": 10}, {"scan_layers": True}
FOUR: dict[str, Any] = {"num_layers": 4, "position": "rope", "window": (3, None)}
NEW_ROWS = "jnp.concatenate([table, jnp.zeros((places - rows, width), table.dtype)])"
BUGS = [
    extended(
        LONGER, "new places that repeat the last one",
        "The new rows of a position table are copies of its last row, not zeros.",
        "embedding", "repeat the last one!",
        edit(init_from._fitting_table, NEW_ROWS,
             "jnp.concatenate([table, jnp.repeat(table[-1:], places - rows, axis=0)])"),
    ),
    extended(
        LONGER, "new places in front",
        "The new rows of a position table come before the old ones, so that every place moves.",
        "embedding", "in front of the old ones!",
        edit(init_from._fitting_table, "[table, jnp.zeros((places - rows, width), table.dtype)]",
             "[jnp.zeros((places - rows, width), table.dtype), table]"),
    ),
    extended(
        LONGER, "new places that repeat the table",
        "The table begins again where it ended.",
        "embedding", "repeat the table!",
        edit(init_from._fitting_table, NEW_ROWS, "jnp.resize(table, (places, width))"),
    ),
    extended(
        LONGER, "table stretched over the new places",
        "The table is interpolated to its new length, so that every place changes.",
        "embedding", "stretched!",
        edit(init_from._fitting_table, NEW_ROWS,
             "jnp.stack([jnp.interp(jnp.linspace(0, rows - 1, places), jnp.arange(rows), x) for x in table.T], 1)"),
    ),
    extended(
        SHORTER, "table cropped from the end",
        "A shorter context keeps the last places of the table.",
        "embedding", "keeps the last places!",
        edit(init_from._fitting_table, "table[:places]", "table[-places:]"),
    ),
    extended(
        {"rope_theta": 5000.0}, "theta that changes in silence",
        "Another base of RoPE's frequencies is taken without a warning.",
        "rope_theta", "taken as one that does not!",
        edit(init_from.fitting_params, "name not in FREE", 'name not in FREE | {"rope_theta"}'),
        quantity="warning", position="rope",
    ),
    extended(
        SCANNED, "layers stacked in reverse",
        "The last layer becomes the first of the stack.",
        "layers/block_0*", "stacked in reverse!",
        edit(layer_stack.stack_params, "blocks[j::period])", "blocks[j::period][::-1])"), **FOUR,
    ),
    extended(
        SCANNED, "layers stacked in runs",
        "The stack of the first place in a period holds the first half of the layers, not every second one.",
        "layers/block_0*", "in runs, not in turn!",
        edit(layer_stack.stack_params, "blocks[j::period])",
             "blocks[j * len(blocks) // period : (j + 1) * len(blocks) // period])"), **FOUR,
    ),
    extended(
        {"scan_layers": False}, "layers unstacked in runs",
        "The layers of a stack are numbered one after another, though the window pattern alternates.",
        "block_1*", "in another order!",
        edit(layer_stack.unstack_params, "places[i % period], i // period",
             "places[i * period // cfg.num_layers], i % (cfg.num_layers // period)"), scan_layers=True, **FOUR,
    ),
    extended(
        LONGER, "weights rounded on the way",
        "The weights pass through float32 and lose digits.",
        "block_0/attention/key", "rounded to float32!",
        edit(init_from.fitting_params, 'params = unflatten_dict(weights, sep="/")',
             'params = unflatten_dict({n: w.astype("float32").astype(w.dtype) for n, w in weights.items()}, sep="/")'),
    ),
]  # fmt: skip
