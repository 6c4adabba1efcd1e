"""Why two implementations differ: known traps, tried out on torch's side where a config or weights can express them."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.parity import updates
from jaxlm.parity.capture import Event
from jaxlm.parity.measure import FLOAT64, Row
from jaxlm.parity.networks import Theirs, Values, computing
from jaxlm.types import Params

HINTS: dict[str, tuple[str, ...]] = {
    "norm": (
        "norm eps: Linen's default is 1e-6, torch's 1e-5, that of torch's RMSNorm the type's",
        "eps outside the root",
        "mean subtracted, or not: RMS norm",
    ),
    "mlp": ("GELU form: jax.nn.gelu is the tanh one by default, torch's the erf one", "gate and up exchanged"),
    "attention": (
        "RoPE layout or theta; it turns queries and keys, after their norms",
        "causal mask off by one: a query sees itself and no future key",
        "window off by one: jaxlm's counts the query itself; windows in another order of layers",
        "mask applied after the softmax, or filled with a value that is not low enough",
        "scores not divided by the root of the head width",
        "key/value heads tiled instead of grouped",
    ),
    "linear": ("kernel transposed: Flax has (in, out), torch (out, in)", "bias left out"),
    "embedding": (
        "positions shifted by one",
        "table transposed or scaled",
        "sines and cosines in halves instead of in turn",
    ),
    "head": ("tied head not transposed, or scaled", "bias left out"),
    "block": ("a residual sum left out", "norm before or after the sublayer"),
    "recurrent": ("order of the gates", "biases: torch has two a gate", "GRU: reset gate before or after the product"),
    "model": ("final norm left out", "logits capped, or not"),
    "logits": ("order of stacked layers", "layers recomputed with other values"),
    "loss": ("padding counted", "divided by the tokens instead of their weights", "summed instead of averaged"),
    "gradient": ("a derivative written by hand (custom_vjp)", "a parameter cut off from the loss (stop_gradient)"),
    "update": (
        "clipped by the global norm, by value, or by norm + 1e-6 as torch has it",
        "decay: before or after the step, times which rate, or added to the gradient (L2); decay of vectors",
        "eps placement, bias correction",
        "second moment of a subset: mean instead of the sum, other axis; factors not divided by their mean",
    ),
    "decoding": (
        "a slot of the ring written or read one off, or before it is written",
        "old keys forgotten, overwritten too early, or masked by slot, not by position",
        "the position of a step not advanced",
        "last token of a prompt read twice",
    ),
    "between": (
        "what is computed between the layers: activation (GELU form), residual sum, scale, mask, order of axes",
        "names that pair layers which are not the same",
    ),
    "rounding": ("products below float32 (TF32, bfloat16)", "softmax or moments narrower than float32"),
}
"""What to look at, by the kind of layer or quantity."""

Probe = tuple[str, ModelConfig, Params]
"""A trap in words, and the config and parameters with which torchref falls into it."""


def of_layer(cfg: ModelConfig, params: Params, windows: np.ndarray, event: Event, ours: Values) -> tuple[str, ...]:
    """Causes of a forward pass that differs from an event on: the traps with which torch gives our values, then hints.

    Compared is the value of that event, or if it is what enters an attention's last layer what the attention returns:
    the heads that are joined there may be in another order.
    """
    joined = event.layer.removesuffix("/out")
    last = Event(joined, "out") if joined.endswith("attention") else event
    exact = dataclasses.replace(cfg, dtype="float64", param_dtype="float64")
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    weights = np.ones((len(windows), windows.shape[1] - 1))
    tried = []
    with computing("float64"):
        for words, probed, leaves in _probes(exact, wide, event):
            values = Theirs(probed, leaves).forward(windows, weights, with_grads=False).values
            if last in values and _agree(ours[last], values[last]):
                tried.append(f"{words} (tried: torch then gives jaxlm's values)")
    return (*tried, *HINTS[_kind(cfg, event)])


def of_gradient(row: Row) -> tuple[str, ...]:
    """Causes of a gradient that differs though the forward passes agree."""
    return HINTS["rounding" if row.verdict == "rounding" else "gradient"]


def of_update(row: Row, name: str, theirs: Theirs, params: Params, grads: Params, ours: np.ndarray) -> tuple[str, ...]:
    """Causes of an optimizer's step that differs, given our float64 result for the parameter that the row names."""
    if row.verdict == "rounding":
        return HINTS["rounding"]
    path = row.name.split()[1]
    wide = [jax.tree.map(lambda leaf: leaf.astype(np.float64), tree) for tree in (params, grads)]
    traps = updates.TRAPS["adam" if name == "adamw" else name]
    tried = []
    with computing("float64"):
        for words, options in traps.items():
            if _agree(ours, updates.torch_updates(name, theirs.cfg, *wide, **options)[path]):
                tried.append(f"{words} (tried: torchref then gives jaxlm's update)")
    return (*tried, *HINTS["update"])


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "erf GELU": lambda x: np.asarray(jax.nn.gelu(x, approximate=False)),
    "tanh GELU": lambda x: np.asarray(jax.nn.gelu(x, approximate=True)),
    "ReLU": lambda x: np.maximum(x, 0),
    "SiLU": lambda x: np.asarray(jax.nn.silu(x)),
    "tanh": np.tanh,
    "nothing": lambda x: x,
}


def of_foreign(
    torch_fn: Any, event: Event, counterparts: dict[Event, Event], ours: Values, theirs: Values
) -> tuple[str, ...]:
    """Causes of a difference between modules that nothing is known of but what passes through them."""
    if event.side == "in":  # something between two layers
        earlier = list(ours)[: list(ours).index(event)]
        before = next((ours[e] for e in reversed(earlier) if e.side == "out" and e in counterparts), None)
        if before is not None and before.shape == ours[event].shape:
            mine, other = (_applied(before, side) for side in (ours[event], theirs[counterparts[event]]))
            if mine and other:
                return (f"{mine} in JAX, {other} in torch (tried on the layer before)",)
        return HINTS["between"]
    layer: Any = dict(torch_fn.named_modules()).get(counterparts[event].layer)
    kind = type(layer).__name__
    entered = ours.get(event._replace(side="in"))
    tried = []
    if hasattr(layer, "eps") and entered is not None:
        eps = _eps_of(layer, entered, ours[event])
        tried = [] if eps is None else [f"eps = {eps:g} in JAX, {layer.eps:g} in torch (tried)"]
    hints = {"norm": "norm", "linear": "linear", "attention": "attention", "rnn": "recurrent", "lstm": "recurrent"}
    hints |= {"gru": "recurrent", "embedding": "embedding"}
    return (*tried, *next((HINTS[of] for part, of in hints.items() if part in kind.lower()), HINTS["between"]))


def _applied(before: np.ndarray, after: np.ndarray) -> str | None:
    """The activation that makes one value of another."""
    return next((name for name, function in ACTIVATIONS.items() if _close(function(before), after)), None)


def _eps_of(layer: Any, entered: np.ndarray, ours: np.ndarray) -> float | None:
    """The usual eps, another than its own, with which a torch norm comes nearest to our output, if that near."""
    import torch

    found = {}
    for eps in (1e-3, 1e-5, 1e-6, 1e-8, 1e-12):
        other = copy.deepcopy(layer)
        other.eps = eps
        with torch.no_grad():
            found[eps] = to_array(other(to_tensor(entered)))
    best = min(found, key=lambda eps: float(np.square(found[eps] - ours).sum()))
    return best if best != layer.eps and _close(found[best], ours) else None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to rounding in the type of both."""
    eps = float(jnp.finfo(b.dtype).eps)
    return bool(np.max(np.abs(a.astype(np.float64) - b), initial=0) <= 8 * eps * np.max(np.abs(b), initial=0))


def _agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool(np.max(np.abs(ours - theirs)) <= FLOAT64 * np.max(np.abs(theirs)))


def _kind(cfg: ModelConfig, event: Event) -> str:
    layer = event.layer if event.side == "out" else event.layer.rpartition("/")[0]
    last = layer.rpartition("/")[2]
    if last.endswith("norm"):
        return "norm"
    if last in ("mlp", "attention"):
        return last
    if not layer:
        first = event.side == "in" and (event.layer == "block_0" or cfg.family == "embedding_bigram")
        return "embedding" if first else "model"
    if last.startswith("block_"):
        return "recurrent" if cfg.family == "recurrent" else "block"
    return "head" if last == "head" else "linear"


def _probes(cfg: ModelConfig, params: Params, event: Event) -> Iterator[Probe]:
    for words, changes in _other_fields(cfg):
        yield words, dataclasses.replace(cfg, **changes), params
    kernel = f"{event.layer}/kernel"
    leaf = _leaf(params, kernel)
    if leaf is not None and leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1]:
        yield "kernel transposed", cfg, _with(params, kernel, leaf.T)
    kind = _kind(cfg, event)
    if kind == "embedding":
        yield from _embedding_probes(cfg, params)
    if kind == "head" and cfg.tie_embeddings:
        for words, scale in _scales(cfg):
            head = _with(params, kernel, params["embedding"].T * scale)
            yield f"tied head {words}", dataclasses.replace(cfg, tie_embeddings=False), head
    if kind == "mlp" and cfg.activation in ("swiglu", "geglu"):
        mlp = event.layer.rpartition("/")[0] if event.side == "in" else event.layer
        gate, up = (_leaf(params, f"{mlp}/{name}") for name in ("gate", "up"))
        yield "gate and up exchanged", cfg, _with(_with(params, f"{mlp}/gate", up), f"{mlp}/up", gate)
    attention = event.layer if event.layer.endswith("attention") else event.layer.rpartition("/")[0]
    if cfg.family == "transformer" and attention.endswith("attention"):
        yield from _attention_probes(cfg, params, attention)


def _other_fields(cfg: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Traps that another value of a field describes."""
    gated = ("swiglu", "geglu")
    names = gated if cfg.activation in gated else ("gelu", "gelu_tanh", "relu", "silu")
    fields: dict[str, tuple[Any, ...]] = {"final_softcap": (None,)}
    if cfg.family == "transformer":
        fields |= {
            "activation": names,
            "norm_eps": (1e-5, 1e-6, 1e-8, 1e-12, 0.0),
            "residual": (True, False),
            "norm_order": ("pre", "post") if cfg.norm == "none" else (),
            "attention_softcap": (None,),
        }
        if cfg.position == "rope":
            thetas = (1e4, 5e5, 1e6, cfg.rope_theta * 10, cfg.rope_theta / 10)
            fields |= {"rope_layout": ("half", "interleaved"), "rope_theta": thetas, "position": ("none",)}
        if any(cfg.layer_windows):
            shifted = (tuple(w and max(1, w + by) for w in cfg.window_period) for by in (1, -1))
            fields["window"] = (*shifted, None)
    for name, values in fields.items():
        now = getattr(cfg, name)
        for value in dict.fromkeys(values):
            if value != now and not (name == "window" and value == cfg.window_period):
                yield f"{name} = {value!r} where the config has {now!r}", {name: value}


def _scales(cfg: ModelConfig) -> Iterator[tuple[str, float]]:
    yield "multiplied by sqrt D", math.sqrt(cfg.embed_dim)
    yield "divided by sqrt D", 1 / math.sqrt(cfg.embed_dim)


def _embedding_probes(cfg: ModelConfig, params: Params) -> Iterator[Probe]:
    if cfg.has_position_table:
        for by in (1, -1):
            shifted = np.roll(params["position_embedding"], by, axis=0)
            yield "positions shifted by one", cfg, _with(params, "position_embedding", shifted)
    for words, scale in _scales(cfg):
        yield f"embedding {words}", cfg, _with(params, "embedding", params["embedding"] * scale)


def _attention_probes(cfg: ModelConfig, params: Params, layer: str) -> Iterator[Probe]:
    query = f"{layer}/query"
    if cfg.attention_score in ("dot", "multiplicative") and not cfg.qk_norm:
        scaled = params
        for name in ("kernel", "bias"):
            if (leaf := _leaf(params, f"{query}/{name}")) is not None:
                scaled = _with(scaled, f"{query}/{name}", leaf * math.sqrt(cfg.head_width))
        yield "scores not divided by the root of the head width", cfg, scaled
    weight = _leaf(params, f"{layer}/score_weight")
    if weight is not None:
        yield "score_weight transposed", cfg, _with(params, f"{layer}/score_weight", weight.swapaxes(1, 2))
    groups = cfg.num_heads // cfg.kv_heads
    out = f"{layer}/out/kernel"
    plain = cfg.attention_score == "dot" and cfg.kv_sharing == "grouped" and _leaf(params, out) is not None
    if plain and 1 < groups < cfg.num_heads:
        # Head n would read key/value head n mod K: the same as reordering the heads before and after.
        order = np.arange(cfg.num_heads).reshape(groups, cfg.kv_heads).T.reshape(-1)
        tiled = params
        for name in ("kernel", "bias"):
            if (leaf := _leaf(params, f"{query}/{name}")) is not None:
                heads = leaf.reshape(*leaf.shape[:-1], cfg.num_heads, cfg.head_width)
                tiled = _with(tiled, f"{query}/{name}", np.take(heads, order, axis=-2).reshape(leaf.shape))
        kernel = _leaf(params, out).reshape(cfg.num_heads, cfg.value_width, -1)
        tiled = _with(tiled, out, kernel[order].reshape(-1, cfg.embed_dim))
        yield "key/value heads tiled instead of grouped", cfg, tiled


def _leaf(params: Params, path: str) -> Any:
    node: Any = params
    for part in path.split("/"):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _with(params: Params, path: str, leaf: Any) -> Params:
    """The tree with one leaf (or all below it) replaced, or added."""
    first, _, rest = path.partition("/")
    return {**params, first: _with(params.get(first, {}), rest, leaf) if rest else leaf}
