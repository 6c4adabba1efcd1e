"""Dropout against torchref: in evaluation, in training under the same masks, and the masks as they are drawn.

A drawn mask has no counterpart in torch. It is read off a model whose logits are the sum of its masks times powers of
two, and must keep the right share of entries and be independent of every other mask.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

import torchref
from jaxlm.config import ModelConfig
from jaxlm.convert import to_torchref
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.convert.torchref import jax_name, torch_name, turned
from jaxlm.model import layers
from jaxlm.model.build import build_model, init_params
from jaxlm.ops import attention
from jaxlm.parity import Report, random_params
from jaxlm.parity.capture import Event, hooked, traced
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import Values, computing
from jaxlm.parity.report import Divergence, first_divergence

SIGMAS = 5.0
HINTS = (
    "kept entries not divided by 1 - rate",
    "applied in evaluation too, or forgotten",
    "before or after the residual sum; weights dropped before or after the softmax",
    "embedding dropout drops words, not entries",
    "a derivative written by hand that forgets the mask",
)
TRAPS: dict[str, Callable[[Any, float], Any]] = {
    "kept entries not divided by 1 - rate": lambda dropped, rate: dropped,
    "kept entries divided by the rate": lambda dropped, rate: dropped / rate,
    "dropout forgotten": lambda dropped, rate: None,
}
"""What torch may do with the entries that are kept, instead of dividing them by 1 - rate."""

PLACES = {2: "words", 3: "the embedding sum and sublayers", 4: "attention weights"}
"""What is dropped, by the number of its axes in torchref."""


def check_dropout(cfg: ModelConfig) -> Report:
    """Compares evaluation, then training under the same masks with its gradients, then looks at drawn masks."""
    plain = dataclasses.replace(cfg, scan_layers=False)
    rows: list[Row] = []
    with computing("float64"):
        params = random_params(plain)
        windows = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 12))
        for quantity, train in (("evaluation", False), ("training", True)):
            in_jax, grads = _in_jax(plain, params, windows, train)
            in_torch, wanted = _in_torch(plain, params, windows, train)
            events = [
                (event, measure(quantity, str(event), [Results(value, in_torch[event])], "float64"))
                for event, value in in_jax.items()
                if event in in_torch
            ]
            rows += [row for event, row in events if event.side == "out"]
            found = first_divergence(quantity, events, ("DIFFERS",))
            if found is not None:
                event, row, divergence = found
                tried = _tried(plain, params, windows, event, in_jax[event]) if train else ()
                return Report((*rows, row), dataclasses.replace(divergence, causes=(*tried, *HINTS)))
            scale = max(np.abs(grad).max() for grad in wanted.values())
            of_grads = [
                measure("gradient", path, [Results(grads[path], grad)], "float64", scale)
                for path, grad in wanted.items()
            ]
            rows += of_grads
            wrong = [row for row in of_grads if not row.passed]
            if wrong:  # gradients flow from the loss: that of the layer that ran last is the first to be wrong
                ends = ["embedding", *(event.layer for event in in_jax if event.side == "out")]
                last = max(wrong, key=lambda row: ends.index(_layer_of(row.name)))
                layer, where = _layer_of(last.name), f"in {quantity}, the gradient of {last.name} differs first"
                return Report(tuple(rows), Divergence("gradient", layer, True, where, HINTS))
        return Report(tuple(rows), _drawn(cfg))


def _layer_of(path: str) -> str:
    return path.rpartition("/")[0] or "embedding"


class Masks:
    """Masks in the order in which they are asked for, the same for every shape of as many entries."""

    def __init__(self) -> None:
        self.count = 0

    def draw(self, rate: float, shape: Any) -> np.ndarray:
        """True where an entry is kept."""
        self.count += 1
        return (np.random.default_rng(self.count).random(int(np.prod(shape))) >= rate).reshape(shape)


def _in_jax(cfg: ModelConfig, params: Any, windows: np.ndarray, train: bool) -> tuple[Values, dict[str, np.ndarray]]:
    model, masks = build_model(cfg), Masks()
    rngs = {"dropout": jax.random.key(0)}  # in evaluation too: who uses it there is found

    def loss(params: Any) -> Any:
        def apply(tokens: Any) -> Any:
            return model.apply({"params": params}, tokens, train=train, rngs=rngs)[0]

        logits, trace = traced(apply)(windows[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], axis=-1)
        return -picked.mean(), trace

    def draw(key: Any, rate: float, shape: tuple[int, ...], lines: Any = None) -> Any:
        return jnp.asarray(masks.draw(rate, shape))

    with mock.patch.object(attention, "draw_kept", draw), mock.patch.object(layers, "draw_kept", draw):
        (_, trace), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return trace.by_event(), {path: np.asarray(grad) for path, grad in flatten_dict(grads, sep="/").items()}


def _in_torch(
    cfg: ModelConfig, params: Any, windows: np.ndarray, train: bool, trap: Any = None, axes: int = 0
) -> tuple[Values, dict[str, np.ndarray]]:
    network, masks = torchref.build_model(cfg).train(train), Masks()
    network.load_state_dict(to_torchref(cfg, params))

    def dropout(x: Any, rate: float = 0.5, training: bool = True) -> Any:
        if not training or not rate:
            return x
        dropped = x * to_tensor(masks.draw(rate, tuple(x.shape)))
        changed = trap(dropped, rate) if axes == x.ndim else dropped / (1 - rate)
        return x if changed is None else changed

    tokens = to_tensor(windows).long()
    with mock.patch.object(torch.nn.functional, "dropout", dropout), hooked(network) as values:
        logits = network(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]).backward()
    named = {event._replace(layer=jax_name(event.layer)): value for event, value in values.items()}
    grads = {
        path: turned(path, to_array(network.get_parameter(torch_name(path)).grad))
        for path in flatten_dict(params, sep="/")
    }
    return named, grads


def _tried(cfg: ModelConfig, params: Any, windows: np.ndarray, event: Event, in_jax: np.ndarray) -> Iterator[str]:
    for (words, trap), (axes, of) in itertools.product(TRAPS.items(), PLACES.items()):
        values = _in_torch(cfg, params, windows, True, trap, axes)[0]
        if measure("training", "", [Results(in_jax, values[event])], "float64").passed:
            yield f"{words}, of {of} (tried: torch then gives jaxlm's values)"


def _drawn(cfg: ModelConfig) -> Divergence | None:
    """The first mask whose share is wrong or that depends on another, under two keys."""
    if not cfg.dropout or cfg.family != "transformer":
        return None
    rate, names = cfg.dropout, ["embedding"]
    names += [f"block_{i}/{part}" for i in range(cfg.num_layers) for part in ("attention", "mlp")]
    masks = np.stack([_read_masks(cfg, len(names), seed) for seed in range(2)])  # [keys, masks, B, T, D]
    variance, count = rate * (1 - rate), masks[0, 0].size
    for layer, mask in zip(names, masks[0], strict=True):
        if abs(mask.mean() - (1 - rate)) > SIGMAS * np.sqrt(variance / count):
            exchanged = abs(mask.mean() - rate) <= SIGMAS * np.sqrt(variance / count)
            cause = f"1 - rate and rate exchanged (tried: the share is {mask.mean():.3f})" if exchanged else "the rate"
            return Divergence("mask", layer, True, f"{mask.mean():.3f} are kept, not {1 - rate:.3f}", (cause,))
    for layer, mask in zip(names, masks[0], strict=True):
        for axis, what in enumerate(("rows", "tokens", "features")):
            for shift in range(1, mask.shape[axis]):
                if cause := _dependent(mask, np.roll(mask, shift, axis), rate, f"{what} {shift} apart"):
                    return Divergence("mask", layer, True, f"{what} of one mask are not independent", (cause,))
    for (layer, mask), (other, second) in itertools.combinations(zip(names, masks[0], strict=True), 2):
        if cause := _dependent(mask, second, rate, f"{layer} and {other}"):
            return Divergence("mask", other, True, f"the masks of {layer} and {other} are not independent", (cause,))
    for layer, mask, second in zip(names, *masks, strict=True):
        if cause := _dependent(mask, second, rate, "two keys"):
            return Divergence("mask", layer, True, "the masks of two keys are not independent", (cause,))
    return None


def _dependent(a: np.ndarray, b: np.ndarray, rate: float, whose: str) -> str | None:
    """What is wrong with two masks if their covariance is not that of independent ones."""
    if np.array_equal(a, b):
        return f"one mask for {whose} (tried: they are equal)"
    covariance = np.mean((a - (1 - rate)) * (b - (1 - rate)))
    if abs(covariance) <= SIGMAS * rate * (1 - rate) / np.sqrt(a.size):
        return None
    return f"numbers used twice for {whose} (tried: their correlation is {covariance / (rate * (1 - rate)):.2f})"


def _read_masks(cfg: ModelConfig, count: int, seed: int) -> np.ndarray:
    """The masks [count, B, T, D] of one training step, with the config's rate, depth and scan."""
    width = 16
    probe = ModelConfig(
        vocab_size=width,
        max_seq_len=8,
        num_layers=cfg.num_layers,
        embed_dim=width,
        num_heads=2,
        mlp_dim=2,
        norm="none",
        position="none",
        tie_embeddings=False,
        dropout=cfg.dropout,
        scan_layers=cfg.scan_layers,
        remat=cfg.remat,
        dtype="float64",
        param_dtype="float64",
    )
    model = build_model(probe)
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), sep="/")
    leaves = {path: np.zeros(leaf.shape) for path, leaf in shapes.items()}
    leaves["embedding"] += 1  # the first mask is that of the sum of embeddings
    leaves["head/kernel"] += np.eye(width)
    for i in range(cfg.num_layers):
        for j, part in enumerate(("attention/out", "mlp/down")):
            value = 2.0 ** (1 + 2 * i + j)
            if cfg.scan_layers:
                leaves[f"layers/block_0/{part}/bias"][i] = value
            else:
                leaves[f"block_{i}/{part}/bias"][:] = value
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf)
    tokens, rngs = jnp.zeros((6, 8), jnp.int32), {"dropout": jax.random.key(seed)}
    logits = jax.jit(lambda: model.apply({"params": params}, tokens, train=True, rngs=rngs)[0])()
    sums = np.round(np.asarray(logits) * (1 - cfg.dropout)).astype(int)
    return np.stack([(sums >> k) & 1 for k in range(count)])
