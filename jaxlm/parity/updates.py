"""Updates: do the optimizers of both frameworks take the same steps from identical gradients?"""

import dataclasses
import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.model.build import build_model
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.parity import causes, optimizer_steps
from jaxlm.parity.comparison import Comparison, pick
from jaxlm.parity.inputs import Inputs
from jaxlm.parity.measure import Distances, Row, distances, judge
from jaxlm.parity.networks import Network, TorchNetwork, computing
from jaxlm.parity.report import Divergence, PartResult
from jaxlm.sharding.layout import put_params
from jaxlm.types import Params


def compare_updates(comparison: Comparison, count: int) -> PartResult:
    """Compares three steps of every optimizer from the gradients of so many batches; one row an optimizer, the worst.

    Both take torch's gradients, of a norm at which one of the three steps is not clipped. Of a large model they update
    the parameters outside the layers and those of the first layers, as all layers are alike to an optimizer: its
    moments would be as large as two models.
    """
    batches = comparison.batches.first(count)
    params = flatten_dict(_updated(comparison, comparison.params), sep="/")
    sizes = {path: float(np.max(np.abs(leaf), initial=0)) for path, leaf in params.items()}
    names = list(optimizer_steps.OPTIMIZERS)
    draws: dict[str, list[dict[str, Distances]]] = {name: [] for name in names}
    for batch in batches:
        grads = _gradients(comparison, batch)
        for name in names:
            draws[name].append(_distances(comparison, name, grads))
    rows, divergences = [], []
    for name in names:
        by_path = [
            # An update changes its parameter and is rounded with it, so rounding errors are shares of the parameter.
            judge("update", f"{name} {path}", [draw[path] for draw in draws[name]], comparison.cfg.dtype, unit=size)
            for path, size in sizes.items()
        ]
        worst = max(by_path, key=_badness)
        rows.append(worst)
        if not worst.passed:
            divergences.append(_divergence(comparison, name, worst))
    bug = next((one for one in divergences if one.verdict == "DIFFERS"), None)
    return PartResult(rows, bug or next(iter(divergences), None))


def _gradients(comparison: Comparison, batch: Inputs) -> Params:
    """torch's gradients of a batch, of a norm at which one of the three steps is not clipped."""
    torch = comparison.networks.each.torch
    with computing(torch.cfg.dtype):
        grads = torch.forward(batch.windows, batch.weights).grads
    return _of_norm(_updated(comparison, unflatten_dict(grads, sep="/")), 1.5 * optimizer_steps.CLIP_NORM)


def _updated(comparison: Comparison, tree: Params) -> Params:
    """Of a tree of unrolled layers, what the optimizers update."""
    layers = _layers(comparison)
    later = {f"block_{i}" for i in range(layers, comparison.cfg.num_layers)}
    return {name: part for name, part in tree.items() if name not in later}


def _layers(comparison: Comparison) -> int:
    """So many of the first layers are updated: of a large model one period of them."""
    cfg = comparison.asked_cfg
    return min(len(cfg.layer_period), cfg.num_layers) if comparison.batches.short else cfg.num_layers


def _distances(comparison: Comparison, name: str, grads: Params) -> dict[str, Distances]:
    """How far apart the updates of an optimizer are, by path."""
    updates = comparison.networks.run(functools.partial(_step, comparison, name, grads=grads))
    return {path: distances(pick(updates, path)) for path in updates.jax}


def _badness(row: Row) -> tuple[int, float]:
    return ("same", "rounding", "DIFFERS").index(row.verdict), row.float64_rel or row.max_rel


def _divergence(comparison: Comparison, name: str, row: Row) -> Divergence:
    path = row.name.split()[1]
    layer = path.rpartition("/")[0] or "embedding"
    given = "from identical parameters, state and gradients"
    if row.verdict == "rounding":
        where = f"the update of {path} by {name} rounds too much, {given}"
        return Divergence("update", layer, True, where, causes.HINTS["rounding"], "rounding")
    where = f"the update of {path} by {name} differs, {given}"
    each = comparison.networks.each
    grads = _gradients(comparison, comparison.batches.first(1)[0])
    with computing("float64"):
        in_jax = _step(comparison, name, each.most_exact_jax, grads)[path]
    cfg = dataclasses.replace(each.most_exact_torch.cfg, num_layers=_layers(comparison))
    tried = causes.of_update(path, name, cfg, _updated(comparison, comparison.params), grads, in_jax)
    return Divergence("update", layer, True, where, tried)


def _step(comparison: Comparison, name: str, network: Network, grads: Params) -> dict[str, np.ndarray]:
    """What an optimizer adds to the parameters, by path; in JAX to layers stacked as they are configured."""
    dtype, layers = network.cfg.param_dtype, _layers(comparison)
    cfg = dataclasses.replace(comparison.asked_cfg, num_layers=layers)
    trees = _updated(comparison, comparison.params), grads
    params, slopes = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in trees)
    if isinstance(network, TorchNetwork):
        return optimizer_steps.torch_updates(name, dataclasses.replace(network.cfg, num_layers=layers), params, slopes)
    model = build_model(cfg)
    if not cfg.scan_layers:
        return optimizer_steps.jax_updates(name, *(put_params(model, tree) for tree in (params, slopes)))
    on_devices = (put_params(model, stack_params(cfg, tree)) for tree in (params, slopes))
    stacked = optimizer_steps.jax_updates(name, *on_devices)
    return flatten_dict(unstack_params(cfg, unflatten_dict(stacked, sep="/")), sep="/")


def _of_norm(tree: Params, norm: float) -> Params:
    """The tree scaled to a global norm; zeros stay zeros."""
    now = np.sqrt(sum(float(np.square(leaf.astype(np.float64)).sum()) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: (leaf * (norm / (now or 1.0))).astype(leaf.dtype), tree)
