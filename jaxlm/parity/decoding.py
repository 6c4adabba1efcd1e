"""Decoding: does the cache give what torch's gives, and does greedy sampling choose the same tokens?"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxlm.parity.capture import Event
from jaxlm.parity.comparison import GREEDY_TOKENS, Comparison, beside, value_distances, with_causes
from jaxlm.parity.measure import Distances, Results, Row, distances, measure
from jaxlm.parity.networks import JaxNetwork, computing
from jaxlm.parity.report import Divergence, PartResult, first_divergence, first_failed_row

LATER_TOKENS, SAMPLED_TOKENS = 12, 12
"""Tokens read after the prefill, as a chunk and then one by one; and tokens sampled."""


class Step(NamedTuple):
    """How far apart the networks are in one call with the cache."""

    values: dict[Event, Distances]
    logits: Distances
    scanned: Distances | None
    """The logits of the model whose layers are scanned."""


def compare_decoding(comparison: Comparison, count: int) -> PartResult:
    """Compares a prefill, a chunk and single tokens through the cache, past its capacity where positions can go on."""
    capacity, read = comparison.capacity, comparison.batches.length
    later = min(read // 2, LATER_TOKENS)
    prefill = read - later
    begins = [0, prefill, *range(prefill + max(1, later // 2), read)]
    rows_read = [batch.windows[: comparison.batches.decoded_rows, :-1] for batch in comparison.batches.first(count)]
    draws = [_decoded(comparison, np.split(rows, begins[1:], axis=1), capacity) for rows in rows_read]
    of_cache = f", cache of {capacity}" if capacity < read or comparison.against_torchref else ""
    rows = [
        comparison.row("decoding", f"prefill of {prefill}", [steps[0].logits for steps in draws]),
        comparison.row(
            "decoding", f"{later} more{of_cache}", [_joined(step.logits for step in steps[1:]) for steps in draws]
        ),
    ]
    if comparison.asked_cfg.scan_layers:
        scanned = [_joined(step.scanned for step in steps if step.scanned is not None) for steps in draws]
        rows.append(comparison.row("decoding", "layers scanned", scanned))
    widths = np.diff([*begins, read]).tolist()
    first = _first_bug(comparison, draws, begins, widths)
    if first is None and all(row.verdict != "DIFFERS" for row in rows):
        first = _first_rounding(comparison, draws, later)
    if first is None:
        return PartResult(rows, with_causes(first_failed_row(rows), "decoding"))
    row, divergence = first
    return PartResult([*rows, row], with_causes(divergence, "decoding"))


def compare_greedy(comparison: Comparison, prompt: np.ndarray | None) -> PartResult:
    """Compares greedy tokens in float64, where near ties do not flip; none where a learned position table is full.

    Args:
      prompt: [B, P]; None = the first half of the first batch.
    """
    tokens = comparison.batches.first(1)[0].windows[: comparison.batches.decoded_rows]
    new = SAMPLED_TOKENS if comparison.against_torchref else GREEDY_TOKENS
    if prompt is None:
        prompt = tokens[:, : tokens.shape[1] // 2]
    capacity = comparison.capacity if comparison.against_torchref else prompt.shape[1] + new
    new = comparison.cfg.within_reach(prompt.shape[1] + new) - prompt.shape[1]
    if new < 1:
        return PartResult([], None)
    capacity = comparison.cfg.within_reach(capacity)
    each = comparison.networks.each
    with computing("float64"):
        chosen = [network.greedy(prompt, new, capacity) for network in (each.most_exact_jax, each.most_exact_torch)]
    rows = [measure("decoding", f"{new} greedy tokens", [Results(*chosen)], "float64")]
    return PartResult(rows, with_causes(first_failed_row(rows), "decoding"))


def _decoded(comparison: Comparison, chunks: list[np.ndarray], capacity: int) -> list[Step]:
    """Reads chunks of tokens one after another through the caches of all networks."""
    scanned: list[np.ndarray | None] = [None] * len(chunks)
    if comparison.asked_cfg.scan_layers:
        with computing(comparison.cfg.dtype):
            network = JaxNetwork(comparison.asked_cfg, comparison.asked_params)
            scanned = [logits for _, logits in network.decode(chunks, capacity)]
    steps = comparison.networks.steps(lambda network: network.decode(chunks, capacity))
    decoded = []
    for step, of_scanned in zip(steps, scanned, strict=True):
        logits = step.map(operator.itemgetter(1))
        own = None if of_scanned is None else distances(beside(of_scanned, logits))
        decoded.append(Step(value_distances(step.map(operator.itemgetter(0))), distances(logits), own))
    return decoded


def _first_bug(
    comparison: Comparison, draws: list[list[Step]], begins: list[int], widths: list[int]
) -> tuple[Row, Divergence] | None:
    """The first layer of the first step that differs. A step has too few numbers to judge its rounding by."""
    for i, (begin, width) in enumerate(zip(begins, widths, strict=True)):
        values = [steps[i].values for steps in draws]
        first = first_divergence("decoding", comparison.event_rows("decoding", values), ("DIFFERS",))
        if first is not None:
            _, row, divergence = first
            what = f"the step at position {begin}" if width == 1 else f"{width} tokens from position {begin}"
            row = dataclasses.replace(row, name=f"{row.name}, position {begin}")
            return row, dataclasses.replace(divergence, where=f"in {what}, {divergence.where}")
    return None


def _first_rounding(comparison: Comparison, draws: list[list[Step]], later: int) -> tuple[Row, Divergence] | None:
    """The first layer that rounds too much: in the prefill, or in all later tokens together."""
    parts = {"the prefill": slice(0, 1), f"the {later} tokens after it": slice(1, None)}
    for what, part in parts.items():
        values = [_joined_values(steps[part]) for steps in draws]
        first = first_divergence("decoding", comparison.event_rows("decoding", values), ("rounding",))
        if first is not None:
            _, row, divergence = first
            row = dataclasses.replace(row, name=f"{row.name}, {what}")
            return row, dataclasses.replace(divergence, where=f"in {what}, {divergence.where}")
    return None


def _joined_values(steps: list[Step]) -> dict[Event, Distances]:
    """The distances of several steps together."""
    return {
        event: _joined(step.values[event] for step in steps)
        for event in steps[0].values
        if all(event in step.values for step in steps)
    }


def _joined(pieces: Iterable[Distances]) -> Distances:
    """The distances of pieces [B, T, ...] that follow each other."""
    parts = list(pieces)
    total = functools.reduce(operator.add, parts)
    batch, _, *rest = total.shape
    return dataclasses.replace(total, shape=(batch, sum(part.shape[1] for part in parts), *rest))
