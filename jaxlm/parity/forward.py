"""The forward pass and its gradients: which layer, or which parameter's gradient, is the first to differ?"""

import dataclasses

import numpy as np

from jaxlm.parity import causes
from jaxlm.parity.capture import Event
from jaxlm.parity.comparison import Comparison, Draw, with_causes
from jaxlm.parity.measure import Row
from jaxlm.parity.networks import computing
from jaxlm.parity.report import Divergence, PartResult, divergence_verdict, first_divergence, first_failed_row


def compare_layers(comparison: Comparison, count: int) -> PartResult:
    """Compares what every layer returns, logits and losses, over so many batches."""
    draws = comparison.draws(count)
    events = comparison.event_rows("activation", [draw.values for draw in draws])
    rows = [row for event, row in events if event.side == "out" and event.layer]
    rows.append(comparison.row("logits", "", [draw.logits for draw in draws]))
    rows.append(comparison.row("loss", "weighted", [draw.loss for draw in draws]))
    rows.append(comparison.row("loss", "of all tokens", [draw.plain_loss for draw in draws]))
    rows += _as_configured(comparison, draws)
    first = first_divergence("activation", events)
    if first is None or (first[1].verdict == "rounding" and any(row.verdict == "DIFFERS" for row in rows)):
        divergence = first_failed_row(rows)
        return PartResult(rows, with_causes(divergence, divergence.quantity if divergence else ""))
    event, failed, divergence = first
    if failed not in rows:  # what enters a layer has no row of its own unless it is the one to look at
        rows.append(failed)
    if failed.verdict == "rounding":
        return PartResult(rows, with_causes(divergence, "rounding"))
    # Only a bug has traps to try: each is another network in float64.
    return PartResult(rows, dataclasses.replace(divergence, causes=tried_causes(comparison, event)))


def tried_causes(comparison: Comparison, event: Event, windows: np.ndarray | None = None) -> tuple[str, ...]:
    """The causes of a bug that shows first at an event: known traps, tried.

    Beside torchref it is jaxlm that fell into one. A source is right by definition, so there a trap explains what
    torchref lacks to give the values of the source.

    Args:
      windows: tokens that show the bug; None = those of the first batch.
    """
    windows = comparison.batches.first(1)[0].windows if windows is None else windows
    each = comparison.networks.each
    explained = each.most_exact_jax if comparison.against_torchref else each.most_exact_torch
    with computing("float64"):
        values = explained.forward(windows, np.ones(windows[:, 1:].shape), with_grads=False).values
    words = (
        "torch then gives jaxlm's values" if comparison.against_torchref else "torchref then gives the source's values"
    )
    return causes.of_layer(comparison.cfg, comparison.params, windows, event, values, words)


def compare_gradients(comparison: Comparison, count: int) -> PartResult:
    """Compares the gradient of the weighted loss in every parameter, over so many batches."""
    draws = comparison.draws(count)
    # A gradient that is zero in theory (a key's bias without RoPE) is judged beside the largest of the others.
    scale = max(distance.largest for distance in draws[0].grads.values())
    paths = list(draws[0].grads)
    rows = [comparison.row("gradient", path, [draw.grads[path] for draw in draws], scale) for path in paths]
    failed = [row for row in rows if row.verdict == "DIFFERS"] or [row for row in rows if not row.passed]
    if not failed:
        return PartResult(rows, None)
    # Gradients flow from the loss: the parameter whose layer ran last is the first whose gradient can be wrong.
    ends = [event.layer for event in draws[0].values if event.side == "out"]
    row = max(failed, key=lambda row: ends.index(layer) if (layer := _layer_of(row.name)) in ends else -1)
    what = "to round too much" if row.verdict == "rounding" else "to differ"
    where = f"the gradient of {row.name} is the first of {len(failed)}, counted from the loss, {what}"
    divergence = Divergence("gradient", _layer_of(row.name), True, where, (), divergence_verdict(row))
    return PartResult(rows, with_causes(divergence, "gradient"))


def _as_configured(comparison: Comparison, draws: list[Draw]) -> list[Row]:
    """The rows of the model as it is trained, if its layers are scanned or recomputed."""
    both = [draw.as_configured for draw in draws if draw.as_configured is not None]
    what = "layers scanned or recomputed"
    rows = [comparison.row("logits", what, [logits for logits, _ in both])] if both else []
    grads = [grads for _, grads in both if grads is not None]
    return rows + ([comparison.row("gradient", what, grads)] if grads else [])


def _layer_of(path: str) -> str:
    return path.rpartition("/")[0] or "embedding"
