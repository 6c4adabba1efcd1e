"""Steps of every optimizer from identical parameters, state and gradients, in JAX and in torch."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.convert.torchref import to_torchref, torch_name, turned
from jaxlm.optim import build_optimizer
from jaxlm.optim.build import OURS
from jaxlm.types import Params

if TYPE_CHECKING:
    import torch

STEPS = (1.0, -0.5, 2.0)
"""Factors of the gradient, one for each step, so that moments, corrections and decay rates all matter."""

CLIP_NORM = 1.0
OPTIMIZERS = {
    name: OptimConfig(
        name=name,
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        clip_norm=CLIP_NORM,
    )
    for name in OURS
}
"""The optimizer of each name as jaxlm trains with it: clipped, and all but adam with decay."""

TRAPS: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {
        "no bias correction": {"bias_correction": False},
        "eps inside the root": {"eps_placement": "inside"},
        "eps added before the correction (the AdamSN authors' and TensorFlow's Adam)": {"eps_placement": "uncorrected"},
        "beta2 0.999": {"gamma": 0.999},
        "no decay": {"weight_decay": 0.0},
    },
    "adamsn": {
        "no bias correction": {"bias_correction": False},
        "eps inside the root": {"eps_placement": "inside"},
        "one number per output": {"subset": "per_output"},
        "one number per input": {"subset": "per_input"},
        "one number per entry of the smaller dimension": {"subset": "smaller"},
        "Adam's second moment on linear kernels": {"subset_size": 1},
        "no decay": {"weight_decay": 0.0},
    },
    "adafactor": {
        "no bias correction": {"bias_correction": False},
        "eps on the squares": {"eps_placement": "squares"},
        "not factored": {"min_dim_size_to_factor": 10**9},
        "no decay": {"weight_decay": 0.0},
    },
    "sgd": {"no decay": {"weight_decay": 0.0}},
}
"""Known differences between optimizers of the same name, as options of torchref's. adamw has those of adam."""


def jax_updates(name: str, params: Params, grads: Params) -> dict[str, np.ndarray]:
    """What STEPS of these gradients add to the parameters in JAX, by path."""
    tx = build_optimizer(OPTIMIZERS[name], len(STEPS))

    @jax.jit
    def run(params: Params, grads: Params) -> Params:
        def step(carry: Any, factor: jax.Array) -> tuple[Any, None]:
            now, state = carry
            updates, state = tx.update(jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state, now)
            return (optax.apply_updates(now, updates), state), None

        (ended, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(STEPS))
        return jax.tree.map(jnp.subtract, ended, params)

    return {path: np.asarray(leaf) for path, leaf in flatten_dict(run(params, grads), sep="/").items()}


def torch_updates(name: str, cfg: ModelConfig, params: Params, grads: Params, **options: Any) -> dict[str, np.ndarray]:
    """The same in torchref; `options` replace those of its optimizer."""
    import torchref

    model = torchref.build_model(cfg)
    model.load_state_dict(to_torchref(cfg, params), strict=True)
    start, kinds = dict(model.named_parameters()), parameter_kinds(model)
    slopes = {
        torch_name(path): to_tensor(turned(path, np.asarray(leaf)))
        for path, leaf in flatten_dict(grads, sep="/").items()
    }
    parts = {n: [part.detach().clone() for part in _matrices(n, p.detach())] for n, p in start.items()}
    leaves = [(kinds[n], part.requires_grad_()) for n in parts for part in parts[n]]
    optimizer = torch_optimizer(OPTIMIZERS[name], leaves, **options)
    for factor in STEPS:
        clipped = torchref.optim.clip_by_global_norm([g * factor for g in slopes.values()], CLIP_NORM)
        for n, grad in zip(slopes, clipped, strict=True):
            for part, slope in zip(parts[n], _matrices(n, grad), strict=True):
                part.grad = slope.clone()
        optimizer.step()
    added = {n: to_array(_stacked(n, parts[n], p.detach()) - p.detach()) for n, p in start.items()}
    return {path: turned(path, added[torch_name(path)]) for path in flatten_dict(params, sep="/")}


def torch_optimizer(
    cfg: OptimConfig, leaves: Sequence[tuple[str, "torch.Tensor"]], **options: Any
) -> "torch.optim.Optimizer":
    """torchref's optimizer for a config, at the config's peak rate and without its clipping.

    Args:
      leaves: pairs of a kind (see `parameter_kinds`) and a parameter, grouped as torchref's docstrings say.
      options: replace those of the config.
    """
    import torchref

    linear, tables, vectors = ([leaf for kind, leaf in leaves if kind == of] for of in ("linear", "table", "vector"))
    groups: list[dict[str, Any]] = [{"params": linear}, {"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    make: Any
    fields: dict[str, Any] = {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay}
    moments: dict[str, Any] = {"beta": cfg.b1, "gamma": cfg.b2, "eps": cfg.eps}
    match cfg.name:
        case "sgd":
            make = torchref.optim.SGD
        case "adafactor":
            make = functools.partial(torchref.optim.Adafactor, gamma=cfg.b2, eps=cfg.eps)
        case "adamsn":
            make = functools.partial(torchref.optim.AdamSN, **moments)
            fields["weight_decay"] *= cfg.adam_lr_ratio
            others = {"lr": cfg.adam_lr_ratio * cfg.learning_rate, "linear": False}
            for group in groups[1:]:
                group.update(others)
            groups[1]["weight_decay"] = options.get("weight_decay", cfg.weight_decay)
        case _:
            make = functools.partial(torchref.optim.AdamW, **moments)
    return make([group for group in groups if group["params"]], **{**fields, **options})


def parameter_kinds(model: "torch.nn.Module") -> dict[str, str]:
    """The kind of each parameter of a torchref model (linear, table or vector), from the torch module that owns it."""
    import torch

    owners = dict(model.named_modules())

    def kind(name: str) -> str:
        owner, _, last = name.rpartition(".")
        if last.startswith("score_"):
            return "linear"
        if last != "weight":
            return "vector"
        return {torch.nn.Linear: "linear", torch.nn.Embedding: "table"}.get(type(owners[owner]).__bases__[0], "vector")

    return {name: kind(name) for name, _ in model.named_parameters()}


def _matrices(name: str, leaf: "torch.Tensor") -> list["torch.Tensor"]:
    """A parameter as matrices (out, in).

    The weights of attention scores are maps [head, in, out], or [head, in] with a single output.
    """
    last = name.rpartition(".")[2]
    if not last.startswith("score_"):
        return [leaf]
    heads = leaf.unbind()
    if last == "score_weight":  # [head, key, query]: from the query to the key
        return list(heads)
    return [head.T if head.ndim == 2 else head[None] for head in heads]


def _stacked(name: str, parts: list["torch.Tensor"], like: "torch.Tensor") -> "torch.Tensor":
    """Inverts `_matrices`."""
    import torch

    if len(parts) == 1 and parts[0].shape == like.shape:
        return parts[0]
    turn = like.ndim == 3 and not name.endswith("score_weight")
    return torch.stack([part.T if turn else part for part in parts]).detach().reshape(like.shape)
