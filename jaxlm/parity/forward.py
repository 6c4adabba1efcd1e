"""The forward pass and its gradients: which layer, or which parameter's gradient, is the first to differ?"""

import dataclasses

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.model.layer_stack import unstack_params
from jaxlm.parity import causes
from jaxlm.parity.comparison import Comparison, pick, with_causes
from jaxlm.parity.measure import Results, Row
from jaxlm.parity.networks import JaxNetwork, computing
from jaxlm.parity.report import Divergence, PartResult, divergence_verdict, first_divergence, first_failed_row


def compare_layers(comparison: Comparison, count: int) -> PartResult:
    """Compares what every layer returns, logits and losses, over so many batches."""
    passes = comparison.passes(count)
    values = [one.map(lambda result: result.values) for one in passes]
    events = comparison.event_rows("activation", values)
    rows = [row for event, row in events if event.side == "out" and event.layer]
    rows.append(comparison.row("logits", "", [one.map(lambda result: result.logits) for one in passes]))
    rows.append(comparison.row("loss", "weighted", [one.map(lambda result: result.loss) for one in passes]))
    rows.append(comparison.row("loss", "of all tokens", [one.map(lambda result: result.plain_loss) for one in passes]))
    if comparison.asked_cfg.scan_layers or comparison.asked_cfg.remat:
        rows += _as_configured(comparison, passes)
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
    windows = comparison.batches.first(1)[0].windows
    tried = causes.of_layer(comparison.cfg, comparison.params, windows, event, values[0].most_exact_jax)
    return PartResult(rows, dataclasses.replace(divergence, causes=tried))


def compare_gradients(comparison: Comparison, count: int) -> PartResult:
    """Compares the gradient of the weighted loss in every parameter, over so many batches."""
    passes = comparison.passes(count)
    grads = [one.map(lambda result: result.grads) for one in passes]
    # A gradient that is zero in theory (a key's bias without RoPE) is judged beside the largest of the others.
    scale = max(float(np.max(np.abs(grad), initial=0)) for grad in grads[0].most_exact_jax.values())
    rows = [comparison.row("gradient", path, [pick(draw, path) for draw in grads], scale) for path in grads[0].jax]
    failed = [row for row in rows if row.verdict == "DIFFERS"] or [row for row in rows if not row.passed]
    if not failed:
        return PartResult(rows, None)
    # Gradients flow from the loss: the parameter whose layer ran last is the first whose gradient can be wrong.
    ends = [event.layer for event in passes[0].jax.values if event.side == "out"]
    row = max(failed, key=lambda row: ends.index(layer) if (layer := _layer_of(row.name)) in ends else -1)
    what = "to round too much" if row.verdict == "rounding" else "to differ"
    where = f"the gradient of {row.name} is the first of {len(failed)}, counted from the loss, {what}"
    divergence = Divergence("gradient", _layer_of(row.name), True, where, (), divergence_verdict(row))
    return PartResult(rows, with_causes(divergence, "gradient"))


def _as_configured(comparison: Comparison, passes: list[Results]) -> list[Row]:
    """Compares the logits and gradients of the model as it is trained: layers scanned or recomputed."""
    cfg, what = comparison.asked_cfg, "layers scanned or recomputed"
    with_grads = bool(passes[0].torch.grads)
    with computing(cfg.dtype):
        network = JaxNetwork(cfg, comparison.asked_params)
        asked = [
            network.forward(batch.windows, batch.weights, with_grads) for batch in comparison.batches.first(len(passes))
        ]

    def row(quantity: str, in_jax: list[np.ndarray], in_torch: list[Results]) -> Row:
        pairs = zip(in_jax, in_torch, strict=True)
        return comparison.row(quantity, what, [Results(a, b.torch, None, b.torch_float64) for a, b in pairs])

    rows = [row("logits", [one.logits for one in asked], [one.map(lambda result: result.logits) for one in passes])]
    if with_grads:
        trees = [unflatten_dict(one.grads, sep="/") for one in asked]
        if cfg.scan_layers:
            trees = [unstack_params(cfg, tree) for tree in trees]
        in_jax = [_concatenated(flatten_dict(tree, sep="/")) for tree in trees]
        rows.append(row("gradient", in_jax, [one.map(lambda result: _concatenated(result.grads)) for one in passes]))
    return rows


def _concatenated(leaves: dict[str, np.ndarray]) -> np.ndarray:
    """All values one after another, sorted by path."""
    return np.concatenate([np.asarray(leaves[path]).reshape(-1) for path in sorted(leaves)])


def _layer_of(path: str) -> str:
    return path.rpartition("/")[0] or "embedding"
