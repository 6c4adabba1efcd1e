"""Long contexts: are late positions the same, too? Some bugs show only after hundreds of tokens."""

import dataclasses
import math

import numpy as np

from jaxlm.parity.causes import HINTS
from jaxlm.parity.comparison import Comparison, value_distances, with_causes
from jaxlm.parity.forward import tried_causes
from jaxlm.parity.measure import FLOAT64, Distances, distances
from jaxlm.parity.report import Divergence, PartResult, first_divergence, first_failed_row

LENGTHS = (512, 2048)
"""Contexts that are read, besides that of the model's last position."""

LAST = 64
"""Tokens read at a model's last positions where the context up to them is longer than LENGTHS."""

SCORES, LOGITS = 2**27, 2**27
"""The most attention scores of a layer, and logits, of a context: 1 GiB in float64. Wider models read shorter ones."""


def compare_positions(comparison: Comparison, count: int) -> PartResult:
    """Compares the logits of one row of each length, and those of the last tokens that the model has positions for.

    Nothing for a model whose context the other parts read whole.
    """
    rows, divergence = [], None
    rng = np.random.default_rng(0)
    for first, length in _places(comparison):
        what = f"at the last {length} of {first + length} positions" if first else f"of {length} tokens"
        draws = [rng.integers(0, comparison.cfg.vocab_size, (1, length + 1)).astype(np.int32) for _ in range(count)]
        found = [_compared(comparison, windows[:, :-1], first) for windows in draws]
        rows.append(comparison.row("logits", what, [distance for distance, _ in found]))
        if rows[-1].verdict == "DIFFERS" and divergence is None:
            divergence = _located(comparison, draws[0], first, found[0][1])
    return PartResult(rows, divergence or with_causes(first_failed_row(rows), "positions"))


def _places(comparison: Comparison) -> list[tuple[int, int]]:
    """The position of the first token, and the number of tokens, of each row that is read."""
    cfg, read = comparison.cfg, comparison.batches.length
    if cfg.family != "transformer" or cfg.max_seq_len <= read:
        return []
    most = min(math.isqrt(SCORES // cfg.num_heads), LOGITS // cfg.vocab_size, LENGTHS[-1], cfg.max_seq_len)
    lengths = sorted({min(length, most) for length in (*LENGTHS, cfg.max_seq_len)})
    places = [(0, length) for length in lengths if length > read]
    if most < cfg.max_seq_len and comparison.networks.each.torch.begins_anywhere:
        places.append((cfg.max_seq_len - LAST, LAST))
    return places


def _compared(comparison: Comparison, tokens: np.ndarray, first: int) -> tuple[Distances, int | None]:
    """How far apart the logits are, and the first position at which they differ in float64."""
    logits = comparison.networks.run(lambda network: network.logits(tokens, first))
    in_jax, in_torch = logits.most_exact_jax, logits.most_exact_torch
    differs = np.abs(in_jax - in_torch).max(axis=(0, 2)) > FLOAT64 * np.abs(in_torch).max()
    return distances(logits), first + int(differs.argmax()) if differs.any() else None


def _located(comparison: Comparison, windows: np.ndarray, first: int, position: int | None) -> Divergence:
    """The first layer that differs over these tokens, where they begin at position 0; else the model."""
    length = windows.shape[1] - 1
    late = f"the logits of {length} tokens from position {first} on differ first at position {position}"
    if not first:
        weights = np.ones((1, length))
        values = comparison.networks.run(lambda network: network.forward(windows, weights, with_grads=False).values)
        found = first_divergence("logits", comparison.event_rows("logits", [value_distances(values)]), ("DIFFERS",))
        if found is not None:
            event, _, divergence = found
            tried = tried_causes(comparison, event, windows)
            where = f"{divergence.where}; {late}"
            return dataclasses.replace(divergence, where=where, causes=(*tried, *HINTS["positions"]))
    return Divergence("logits", "model", True, late, HINTS["positions"])
