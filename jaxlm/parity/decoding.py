"""Decoding: does the cache give what torch's gives, and does greedy sampling choose the same tokens?"""

import dataclasses
import functools

import jax
import numpy as np

from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.decode.generate import generate
from jaxlm.parity.comparison import Comparison, with_causes
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import JaxNetwork, TorchNetwork, Values, computing
from jaxlm.parity.report import Divergence, PartResult, first_divergence, first_failed_row

LATER_TOKENS, GREEDY_TOKENS = 12, 12
"""Tokens read after the prefill, as a chunk and then one by one; and tokens sampled."""

Step = tuple[Values, np.ndarray]
"""The values by event and the logits of one call with the cache."""


def compare_decoding(comparison: Comparison, count: int) -> PartResult:
    """Compares a prefill, a chunk and single tokens through the cache, past its capacity where positions can go on."""
    networks = comparison.decoding_networks
    capacity, read = networks.each.jax.cfg.max_seq_len, comparison.batches.length
    later = min(read // 2, LATER_TOKENS)
    prefill = read - later
    begins = [0, prefill, *range(prefill + max(1, later // 2), read)]
    rows_read = [batch.windows[: comparison.batches.decoded_rows, :-1] for batch in comparison.batches.first(count)]
    chunks = [np.split(rows, begins[1:], axis=1) for rows in rows_read]
    results = [networks.run(functools.partial(_decode, chunks=one)) for one in chunks]
    rows = [
        comparison.row("decoding", f"prefill of {prefill}", [draw.map(lambda steps: steps[0][1]) for draw in results]),
        comparison.row(
            "decoding", f"{later} more, cache of {capacity}", [draw.map(_logits_after_prefill) for draw in results]
        ),
    ]
    if comparison.asked_cfg.scan_layers:
        rows.append(_scanned(comparison, chunks, results, capacity))
    widths = [chunk.shape[1] for chunk in chunks[0]]
    first = _first_bug(comparison, results, begins, widths)
    if first is None and all(row.verdict != "DIFFERS" for row in rows):
        first = _first_rounding(comparison, results, later)
    if first is None:
        return PartResult(rows, with_causes(first_failed_row(rows), "decoding"))
    row, divergence = first
    return PartResult([*rows, row], with_causes(divergence, "decoding"))


def compare_greedy(comparison: Comparison, prompt: np.ndarray | None) -> PartResult:
    """Compares greedy tokens in float64, where near ties do not flip; none where a learned position table is full.

    Args:
      prompt: [B, P]; None = the first half of the first batch.
    """
    import torchref

    each, cfg = comparison.decoding_networks.each, comparison.cfg
    in_jax, in_torch = each.most_exact_jax, each.most_exact_torch
    tokens, new = comparison.batches.first(1)[0].windows[: comparison.batches.decoded_rows], GREEDY_TOKENS
    if prompt is None:
        prompt = tokens[:, : tokens.shape[1] // 2]
    new = cfg.within_reach(prompt.shape[1] + new) - prompt.shape[1]
    if new < 1:
        return PartResult([], None)
    with computing("float64"):
        chosen = generate(
            in_jax.model,
            in_jax.params,
            prompt.astype(np.int32),
            max_new_tokens=new,
            key=jax.random.key(0),
            temperature=0.0,
            capacity=in_jax.cfg.max_seq_len,
        ).tokens
    expected = torchref.generate(in_torch.model, to_tensor(prompt).long(), new, 0.0, use_kv_cache=True)
    rows = [measure("decoding", f"{new} greedy tokens", [Results(np.asarray(chosen), to_array(expected))], "float64")]
    return PartResult(rows, with_causes(first_failed_row(rows), "decoding"))


def _first_bug(
    comparison: Comparison, results: list[Results], begins: list[int], widths: list[int]
) -> tuple[Row, Divergence] | None:
    """The first layer of the first step that differs. A step has too few numbers to judge its rounding by."""
    for i, (begin, width) in enumerate(zip(begins, widths, strict=True)):
        values = [draw.map(lambda steps, i=i: steps[i][0]) for draw in results]  # type: ignore[misc]
        first = first_divergence("decoding", comparison.event_rows("decoding", values), ("DIFFERS",))
        if first is not None:
            _, row, divergence = first
            what = f"the step at position {begin}" if width == 1 else f"{width} tokens from position {begin}"
            row = dataclasses.replace(row, name=f"{row.name}, position {begin}")
            return row, dataclasses.replace(divergence, where=f"in {what}, {divergence.where}")
    return None


def _first_rounding(comparison: Comparison, results: list[Results], later: int) -> tuple[Row, Divergence] | None:
    """The first layer that rounds too much: in the prefill, or in all later tokens together."""
    parts = {"the prefill": slice(0, 1), f"the {later} tokens after it": slice(1, None)}
    for what, steps in parts.items():
        values = [draw.map(functools.partial(_joined_values, steps=steps)) for draw in results]
        first = first_divergence("decoding", comparison.event_rows("decoding", values), ("rounding",))
        if first is not None:
            _, row, divergence = first
            row = dataclasses.replace(row, name=f"{row.name}, {what}")
            return row, dataclasses.replace(divergence, where=f"in {what}, {divergence.where}")
    return None


def _joined_values(decoded: list[Step], steps: slice) -> Values:
    """The values of several steps, flattened, one after another."""
    chosen = [values for values, _ in decoded[steps]]
    return {
        event: np.concatenate([values[event].reshape(-1) for values in chosen])
        for event in chosen[0]
        if all(event in values for values in chosen)
    }


def _scanned(comparison: Comparison, chunks: list[list[np.ndarray]], results: list[Results], capacity: int) -> Row:
    """Compares the logits of the model whose layers are scanned, through its cache."""
    with computing(comparison.cfg.dtype):
        cfg = dataclasses.replace(comparison.asked_cfg, max_seq_len=capacity)
        network = JaxNetwork(cfg, comparison.asked_params)
        in_jax = [_logits(network.decode(one)) for one in chunks]
    pairs = zip(in_jax, [draw.map(_logits) for draw in results], strict=True)
    draws = [Results(logits, draw.torch, None, draw.torch_float64) for logits, draw in pairs]
    return comparison.row("decoding", "layers scanned", draws)


def _decode(network: JaxNetwork | TorchNetwork, chunks: list[np.ndarray]) -> list[Step]:
    return network.decode(chunks)


def _logits(decoded: list[Step]) -> np.ndarray:
    return np.concatenate([logits for _, logits in decoded], axis=1)


def _logits_after_prefill(decoded: list[Step]) -> np.ndarray:
    return _logits(decoded[1:])
