"""Padding: does each row of a padded batch give what torch gives for that row alone, with and without the cache?"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.convert.torchref import jax_name
from jaxlm.decode.generate import generate
from jaxlm.parity.capture import Event, hooked, traced
from jaxlm.parity.comparison import Comparison
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import JaxNetwork, Values, computing
from jaxlm.parity.report import Divergence, PartResult, first_divergence, first_failed_row

ROWS, LATER, STEPS, NEW_TOKENS = 3, 8, 2, 6
"""Rows of the batch; tokens read after the prefill, the last ones singly; and tokens sampled."""

LONGEST = 160
"""Tokens of a row, at most: blocks of attention begin at 128, and all values of all layers are kept."""

HINTS = (
    "padding seen by the mask: a key of position -1 is nobody's",
    "padding written to the cache or to a recurrent state",
    "positions that count padding, in a row or from call to call",
    "lengths off by one",
    "last token of a padded prompt taken from the last column",
)
TRIED = "(tried: torch then gives jaxlm's values)"


class Piece(NamedTuple):
    """What all rows read in one call: `lengths` real tokens of each, then padding."""

    what: str
    tokens: np.ndarray
    lengths: np.ndarray


def compare_padding(comparison: Comparison) -> PartResult:
    """Compares rows of several lengths in one batch with each row alone, in float64: only a formula can be wrong here.

    A batch without a cache, a prefill, a chunk that holds nothing for one row, single tokens, and greedy tokens after
    prompts of several lengths. Padding holds real token ids, so that whoever reads it is seen.
    """
    given = comparison.batches.first(1)[0].windows[:, :-1]
    windows = np.resize(given, (ROWS, given.shape[1]))[:, :LONGEST]
    each, capacity = comparison.networks.each, _capacity(comparison.cfg, windows.shape[1])
    alone = [Piece("a padded batch", windows, _lengths(windows.shape[1]))]
    rows: list[Row] = []
    for pieces, slots in ((alone, None), (_cached_pieces(windows), capacity)):
        in_jax = _jax_values(each.most_exact_jax, pieces, slots)
        torch_model = each.most_exact_torch.with_capacity(
            slots or max(comparison.cfg.max_seq_len, windows.shape[1])
        ).model
        in_torch = _torch_values(torch_model, pieces)
        for i, piece in enumerate(pieces):
            events = [
                (event, _row(piece.what, event, value, in_torch[i]))
                for event, value in in_jax[i].items()
                if event in in_torch[i][0]
            ]
            rows.append(next(row for event, row in events if event == Event("", "out")))
            found = first_divergence("padding", events, ("DIFFERS",))
            if found is not None:
                event, failed, divergence = found
                where = f"in {piece.what}, {divergence.where}"
                tried = _tried(comparison.cfg, torch_model, pieces, i, event, in_jax[i][event])
                said = dataclasses.replace(divergence, where=where, causes=(*tried, *HINTS))
                return PartResult([*rows, failed], said)
    rows += _greedy(comparison, windows)
    failed_row: Divergence | None = first_failed_row(rows)
    return PartResult(rows, failed_row and dataclasses.replace(failed_row, causes=HINTS))


def _capacity(cfg: ModelConfig, width: int) -> int:
    """Of a cache that overflows, where positions can go on past it."""
    return cfg.max_seq_len if cfg.has_position_table else max(2, 2 * width // 3)


def _lengths(width: int) -> np.ndarray:
    return np.array([width, width // 2 + 1, 1])[:ROWS].clip(max=width)


def _cached_pieces(windows: np.ndarray) -> list[Piece]:
    """A prefill, a chunk of which one row takes nothing, and single tokens."""
    width = windows.shape[1]
    later = min(LATER, width // 2)
    begin, steps = width - later, min(STEPS, later)
    pieces = [Piece("a padded prefill", windows[:, :begin], _lengths(begin))]
    if chunk := later - steps:
        middle = windows[:, begin : begin + chunk]
        pieces.append(Piece("a padded chunk after it", middle, np.array([chunk // 2, 0, chunk])))
    every = np.ones(ROWS, int)
    return pieces + [
        Piece(f"step {i + 1} after padding", windows[:, at : at + 1], every)
        for i, at in enumerate(range(width - steps, width))
    ]


def _jax_values(network: JaxNetwork, pieces: list[Piece], capacity: int | None) -> list[Values]:
    """The real tokens' values of each piece, the rows one after another; without a cache if it has no capacity."""

    def apply(params: Any, tokens: Any, cache: Any, lengths: Any) -> Any:
        return network.model.apply({"params": params}, tokens, cache=cache, lengths=lengths)

    results = []
    with computing(network.cfg.dtype):
        run = jax.jit(traced(apply))
        cache = None if capacity is None else network.model.init_cache(ROWS, capacity)
        for piece in pieces:
            lengths = None if piece.tokens.shape[1] == 1 else piece.lengths.astype(np.int32)
            (_, cache), trace = run(network.params, piece.tokens.astype(np.int32), cache, lengths)
            values = {
                event: np.concatenate([row[:real] for row, real in zip(value, piece.lengths, strict=True)])
                for event, value in trace.by_event().items()
                if value.shape[:2] == piece.tokens.shape
            }
            results.append(values)
    return results


def _torch_values(model: Any, pieces: list[Piece], read: str = "each row alone") -> list[list[Values]]:
    """The values of each row alone, piece by piece; or as they would be if padding were read, or took positions."""
    results: list[list[Values]] = [[] for _ in pieces]
    for row in range(ROWS):
        model.clear_cache()
        for i, piece in enumerate(pieces):
            real, width = int(piece.lengths[row]), piece.tokens.shape[1]
            if taken := width if read == "padding too" else real:
                values = _go_on(model, piece.tokens[row : row + 1, :taken])
                results[i].append({event: value[0, :real] for event, value in values.items()})
            if read == "padding counted":
                model.seen += width - real
        model.clear_cache()
    return results


def _go_on(model: Any, tokens: np.ndarray) -> Values:
    """What passes through torch's layers as it reads tokens [1, T] behind those in its cache."""
    import torch

    with torch.no_grad(), hooked(model) as values:
        model(to_tensor(tokens).long(), use_kv_cache=True)
    return {event._replace(layer=jax_name(event.layer)): value for event, value in values.items()}


def _row(what: str, event: Event, in_jax: np.ndarray, in_torch: list[Values]) -> Row:
    name = what if event == Event("", "out") else f"{event}, {what}"
    return measure("padding", name, [Results(in_jax, _joined(in_torch, event))], "float64")


def _joined(rows: list[Values], event: Event) -> np.ndarray:
    return np.concatenate([values[event] for values in rows])


def _tried(cfg: ModelConfig, model: Any, pieces: list[Piece], at: int, event: Event, in_jax: np.ndarray) -> list[str]:
    """Traps in which torch gives JAX's values."""
    traps = {
        "padding too": "lengths ignored: padding is read, and cached, as tokens",
        "padding counted": "positions that count padding: the next token is not placed behind the last real one",
    }
    found, width = [], sum(piece.tokens.shape[1] for piece in pieces[: at + 1])
    for read, words in traps.items():
        if cfg.within_reach(width) == width:
            values = _torch_values(model, pieces[: at + 1], read)[at]
            if _row("", event, in_jax, values).passed:
                found.append(f"{words} {TRIED}")
    return found


def _greedy(comparison: Comparison, windows: np.ndarray) -> list[Row]:
    """Greedy tokens after prompts of several lengths in one batch, and after each alone, with their probabilities."""
    each, cfg = comparison.networks.each, comparison.cfg
    capacity = _capacity(cfg, windows.shape[1])
    in_jax, torch_model = each.most_exact_jax, each.most_exact_torch.with_capacity(capacity).model
    prompt = windows[:, : windows.shape[1] // 2 + 1]
    new = min(NEW_TOKENS, cfg.within_reach(prompt.shape[1] + NEW_TOKENS) - prompt.shape[1])
    if new < 1:
        return []
    lengths = _lengths(prompt.shape[1])
    with computing("float64"):
        found = generate(
            in_jax.model,
            in_jax.params,
            prompt.astype(np.int32),
            max_new_tokens=new,
            key=jax.random.key(0),
            temperature=0.0,
            prompt_lengths=lengths,
            capacity=capacity,
        )
    alone = [_greedy_row(torch_model, row[None, :real], new) for row, real in zip(prompt, lengths, strict=True)]
    tokens, log_probs = (np.concatenate(rows) for rows in zip(*alone, strict=True))
    pairs = {"greedy tokens": (found.tokens, tokens), "log-probabilities": (found.log_probs, log_probs)}
    return [
        measure("decoding", f"{new} {what} after padded prompts", [Results(np.asarray(ours), theirs)], "float64")
        for what, (ours, theirs) in pairs.items()
    ]


def _greedy_row(model: Any, prompt: np.ndarray, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [1, new] after one prompt [1, P], and their log-probabilities."""
    import torch

    import torchref

    ids = to_tensor(prompt).long()
    tokens = torchref.generate(model, ids, new, 0.0, use_kv_cache=True)
    with torch.no_grad():
        logits = model(torch.cat([ids, tokens[:, :-1]], dim=1), use_kv_cache=True)[:, -new:]
    model.clear_cache()
    log_probs = logits.log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0]
    return to_array(tokens), to_array(log_probs)
