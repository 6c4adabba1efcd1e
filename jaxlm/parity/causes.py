"""Why two implementations differ: known traps. Those that a config or weights can express are tried in torch."""

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
from jaxlm.errors import UserError
from jaxlm.parity import optimizer_steps
from jaxlm.parity.attention_form import differences, find_form
from jaxlm.parity.capture import Event
from jaxlm.parity.measure import FLOAT64
from jaxlm.parity.networks import TorchNetwork, Values, computing
from jaxlm.types import Params

HINTS: dict[str, tuple[str, ...]] = {
    "norm": (
        "norm eps: Linen's default is 1e-6, torch's 1e-5, and torch.nn.RMSNorm's the machine epsilon of the type",
        "eps outside the root",
        "mean subtracted or not: an RMS norm does not subtract it",
    ),
    "mlp": (
        "GELU form: jax.nn.gelu is the tanh approximation by default, torch's the exact erf form",
        "gate and up exchanged",
    ),
    "attention": (
        "RoPE layout or theta; RoPE turns both queries and keys, after their norms",
        "causal mask off by one: a query sees itself and no future key",
        "window off by one: jaxlm's counts the query itself; or the windows of the layers in another order",
        "mask applied after the softmax, or filled with a value that is not low enough",
        "scores not divided by the root of the head width",
        "key/value heads tiled instead of grouped",
    ),
    "linear": ("kernel transposed: Flax has (in, out), torch (out, in)", "bias left out"),
    "embedding": (
        "positions shifted by one",
        "table transposed or scaled",
        "sines and cosines in two halves instead of alternating",
    ),
    "head": ("tied head not transposed, or scaled", "bias left out"),
    "block": ("a residual sum left out", "norm before or after the sublayer"),
    "recurrent": (
        "order of the gates",
        "biases: torch has two for each gate",
        "GRU: reset gate applied before or after the product",
    ),
    "model": ("final norm left out", "logits capped, or not"),
    "logits": ("order of stacked layers", "layers recomputed (remat) with other values"),
    "loss": (
        "padding counted",
        "divided by the number of tokens instead of their weights",
        "summed instead of averaged",
    ),
    "gradient": ("a derivative written by hand (custom_vjp)", "a parameter cut off from the loss (stop_gradient)"),
    "update": (
        "clipped by the global norm, by value, or by norm + 1e-6 as torch does",
        "decay: before or after the step, times which rate, or added to the gradient (L2); decay of vectors",
        "eps placement, bias correction",
        "second moment of a subset: mean instead of the sum, other axis; factors not divided by their mean",
    ),
    "decoding": (
        "a slot of the ring written or read one off, or before it is written",
        "old keys forgotten, overwritten too early, or masked by slot, not by position",
        "the position of a step not advanced",
        "last token of the prompt read twice",
    ),
    "positions": (
        "positions or RoPE's angles below float32: bfloat16 holds no odd number above 256",
        "positions taken modulo a length, or cut at one",
        "rope scaling, or the features that a partial rotation turns",
    ),
    "between": (
        "what is computed between the layers: activation (GELU form), residual sum, scale, mask, order of axes",
        "names that pair layers which are not counterparts",
    ),
    "rounding": (
        "products below float32 (TF32, bfloat16)",
        "softmax or moments narrower than float32",
        "a long sum kept in bfloat16, such as a bias gradient over many tokens",
    ),
}
"""What to look at, for each kind of layer or quantity."""

Probe = tuple[str, ModelConfig, Params]
"""A trap in words, and the config and parameters with which torchref falls into it."""


def of_layer(
    cfg: ModelConfig, params: Params, windows: np.ndarray, event: Event, explained: Values, says: str
) -> tuple[str, ...]:
    """Causes of a forward pass that differs from an event on: traps with which torchref gives some values, then hints.

    The values of the event itself are compared. For what enters an attention's last layer those of the whole attention
    are: a trap may join the heads in another order there.

    Args:
      explained: the values, in float64, that a trap should give.
      says: what a trap that gives them says.
    """
    attention = event.layer.removesuffix("/out")
    compared = Event(attention, "out") if attention.endswith("attention") else event
    exact = dataclasses.replace(cfg, dtype="float64", param_dtype="float64")
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    weights = np.ones((len(windows), windows.shape[1] - 1))
    tried = []
    with computing("float64"):
        for words, trap_cfg, trap_params in _probes(exact, wide, event):
            values = TorchNetwork(trap_cfg, trap_params).forward(windows, weights, with_grads=False).values
            if compared in values and compared in explained and _agree(explained[compared], values[compared]):
                tried.append(f"{words} (tried: {says})")
    return (*tried, *HINTS[_kind(cfg, event)])


def of_update(
    path: str, name: str, cfg: ModelConfig, params: Params, grads: Params, in_jax: np.ndarray
) -> tuple[str, ...]:
    """Causes of an optimizer's step that differs.

    Args:
      path: of a parameter whose update differs.
      cfg: of the torch network.
      in_jax: jaxlm's float64 update of that parameter.
    """
    wide = [jax.tree.map(lambda leaf: leaf.astype(np.float64), tree) for tree in (params, grads)]
    traps = optimizer_steps.TRAPS["adam" if name == "adamw" else name]
    tried = []
    with computing("float64"):
        for words, options in traps.items():
            if _agree(in_jax, optimizer_steps.torch_updates(name, cfg, *wide, **options)[path]):
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
    torch_fn: Any, event: Event, counterparts: dict[Event, Event], in_jax: Values, in_torch: Values
) -> tuple[str, ...]:
    """Causes of a difference between modules of which only the values that pass through them are known."""
    counterpart = counterparts[event]
    of_attention = [event.layer.rpartition("/")[0], counterpart.layer.rpartition(".")[0]]
    if event.side == "out":
        of_attention = [event.layer, counterpart.layer]
    ours, theirs = find_form(in_jax, of_attention[0], "/"), find_form(in_torch, of_attention[1], ".")
    if ours is not None and theirs is not None and ours != theirs:
        tried = [f"{words} (tried on the projections of this layer)" for words in differences(ours, theirs)]
        return (*tried, *HINTS["attention"])
    if (ours is None) != (theirs is None):  # attention, of which one side is none of the known forms
        return HINTS["attention"]
    if event.side == "in":
        # The layers before agree: whatever stands between the last of them and this input is different. If that is a
        # known activation in both, it maps one captured value to the other.
        earlier = list(in_jax)[: list(in_jax).index(event)]
        before = next((in_jax[e] for e in reversed(earlier) if e.side == "out" and e in counterparts), None)
        if before is not None and before.shape == in_jax[event].shape:
            jax_form, torch_form = (_applied(before, x) for x in (in_jax[event], in_torch[counterpart]))
            if jax_form and torch_form:
                return (f"{jax_form} in JAX, {torch_form} in torch (tried on the layer before)",)
        return HINTS["between"]
    layer: Any = dict(torch_fn.named_modules()).get(counterpart.layer)
    kind = type(layer).__name__
    entered = in_jax.get(event._replace(side="in"))
    tried = []
    if hasattr(layer, "eps") and entered is not None:
        eps = _eps_of(layer, entered, in_jax[event])
        tried = [] if eps is None else [f"eps = {eps:g} in JAX, {layer.eps:g} in torch (tried)"]
    hints = {"norm": "norm", "linear": "linear", "attention": "attention", "rnn": "recurrent", "lstm": "recurrent"}
    hints |= {"gru": "recurrent", "embedding": "embedding"}
    return (*tried, *next((HINTS[of] for part, of in hints.items() if part in kind.lower()), HINTS["between"]))


def _applied(before: np.ndarray, after: np.ndarray) -> str | None:
    """The activation that maps one value to another."""
    return next((name for name, function in ACTIVATIONS.items() if _close(function(before), after)), None)


def _eps_of(layer: Any, entered: np.ndarray, in_jax: np.ndarray) -> float | None:
    """The eps with which a torch norm gives JAX's output: the nearest of the usual ones, if it is not torch's own."""
    import torch

    outputs = {}
    for eps in (1e-3, 1e-5, 1e-6, 1e-8, 1e-12):
        other = copy.deepcopy(layer)
        other.eps = eps
        with torch.no_grad():
            outputs[eps] = to_array(other(to_tensor(entered)))
    best = min(outputs, key=lambda eps: float(np.square(outputs[eps] - in_jax).sum()))
    return best if best != layer.eps and _close(outputs[best], in_jax) else None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to rounding in the type of both."""
    eps = float(jnp.finfo(b.dtype).eps)
    return bool(np.max(np.abs(a.astype(np.float64) - b), initial=0) <= 8 * eps * np.max(np.abs(b), initial=0))


def _agree(in_jax: np.ndarray, in_torch: np.ndarray) -> bool:
    """Whether two float64 results are the same."""
    if in_jax.shape != in_torch.shape:
        return False
    return bool(np.max(np.abs(in_jax - in_torch)) <= FLOAT64 * np.max(np.abs(in_torch)))


def _kind(cfg: ModelConfig, event: Event) -> str:
    """The key of HINTS for an event: what enters a layer is made by the layer around it."""
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
    """Every trap that could show first at this event."""
    for words, changes in _other_fields(cfg):
        try:
            changed = dataclasses.replace(cfg, **changes)
        except UserError:  # no model has these values together
            continue
        yield words, changed, params
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
    if kind == "mlp" and cfg.activation in ("swiglu", "geglu", "geglu_tanh"):
        mlp = event.layer.rpartition("/")[0] if event.side == "in" else event.layer
        gate, up = (_leaf(params, f"{mlp}/{name}") for name in ("gate", "up"))
        yield "gate and up exchanged", cfg, _with(_with(params, f"{mlp}/gate", up), f"{mlp}/up", gate)
    attention = event.layer if event.layer.endswith("attention") else event.layer.rpartition("/")[0]
    if cfg.family == "transformer" and attention.endswith("attention"):
        yield from _attention_probes(cfg, params, attention)


def _other_fields(cfg: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Traps that are another value of a field of the config."""
    gated = ("swiglu", "geglu", "geglu_tanh")
    names = gated if cfg.activation in gated else ("gelu", "gelu_tanh", "relu", "silu")
    fields: dict[str, tuple[Any, ...]] = {"final_softcap": (None,)}
    if cfg.family == "transformer":
        fields |= {
            "activation": names,
            "norm_eps": (1e-5, 1e-6, 1e-8, 1e-12, 0.0),
            "residual": (True, False),
            "block_layout": () if cfg.block_layout == "parallel_one_norm" else ("sequential", "parallel"),
            "norm_order": ("pre", "post") if cfg.norm == "none" else (),
            "attention_softcap": (None,),
            "attention_scale": (None, 1.0),
            "embedding_scale": (1.0, math.sqrt(cfg.embed_dim)),
            "residual_scale": (1.0,),
            "logit_divisor": (1.0,),
            "norm_unit_offset": (True, False),
        }
        if cfg.position == "rope":
            period = [layer.rope_theta for layer in cfg.layer_period]
            tenfold = [tuple(theta * by for theta in period) for by in (10, 0.1)]
            nearby = [one[0] if len(one) == 1 else one for one in tenfold]
            fields |= {"rope_layout": ("half", "interleaved"), "rope_theta": (1e4, 5e5, 1e6, *nearby, *set(period))}
            fields |= {"rotary_dim": (None, cfg.resolved.head_dim // 4 * 2 or None), "position": ("none",)}
            fields |= {"rope_factor": (1.0,), "rope_attention_factor": (1.0,)}
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
    """Traps that no field describes, but changed weights: queries times sqrt H cancel the scores' 1 / sqrt H."""
    query = f"{layer}/query"
    if cfg.attention_score in ("dot", "multiplicative") and not cfg.qk_norm:
        scaled = params
        for name in ("kernel", "bias"):
            if (leaf := _leaf(params, f"{query}/{name}")) is not None:
                scaled = _with(scaled, f"{query}/{name}", leaf * math.sqrt(cfg.resolved.head_dim))
        yield "scores not divided by the root of the head width", cfg, scaled
    weight = _leaf(params, f"{layer}/score_weight")
    if weight is not None:
        yield "score_weight transposed", cfg, _with(params, f"{layer}/score_weight", weight.swapaxes(1, 2))
    groups = cfg.num_heads // cfg.resolved.num_kv_heads
    out = f"{layer}/out/kernel"
    plain = cfg.attention_score == "dot" and cfg.kv_sharing == "grouped" and _leaf(params, out) is not None
    if plain and 1 < groups < cfg.num_heads:
        # Tiled, head n reads key/value head n mod K. Reordering the heads of the queries and of `out` does the same.
        order = np.arange(cfg.num_heads).reshape(groups, cfg.resolved.num_kv_heads).T.reshape(-1)
        tiled = params
        for name in ("kernel", "bias"):
            if (leaf := _leaf(params, f"{query}/{name}")) is not None:
                heads = leaf.reshape(*leaf.shape[:-1], cfg.num_heads, cfg.resolved.head_dim)
                tiled = _with(tiled, f"{query}/{name}", np.take(heads, order, axis=-2).reshape(leaf.shape))
        kernel = _leaf(params, out).reshape(cfg.num_heads, cfg.resolved.value_head_dim, -1)
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
