"""Steps of every optimizer from identical parameters, state and gradients, in JAX and in torch."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.config import OptimConfig
from jaxlm.convert.torchref import by_path, to_array, to_tensor
from jaxlm.optim import build_optimizer
from jaxlm.optim.build import OURS
from jaxlm.optim.kinds import ParamKind, kinds_like
from jaxlm.types import Params

if TYPE_CHECKING:
    import torch

STEPS = (1.0, -0.5, 2.0)
"""What the gradient is multiplied by in each step, so that moments, corrections and decay rates all show."""

CLIP_NORM = 1.0
OPTIMIZERS = {
    name: OptimConfig(
        name=name,
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0 if name == "adam" else 0.1,
        clip_norm=CLIP_NORM,
    )
    for name in OURS
}
"""What jaxlm trains with under each name: clipped, with decay; adam is adamw without decay."""

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
"""Known differences between optimizers of one name, as options of torchref's. adamw has those of adam."""


def jax_updates(params: Params, grads: Params) -> dict[str, dict[str, np.ndarray]]:
    """By optimizer and path, what STEPS of these gradients add to the parameters."""

    @jax.jit
    def run(params: Params, grads: Params) -> dict[str, Params]:
        results = {}
        for name, cfg in OPTIMIZERS.items():
            tx = build_optimizer(cfg, len(STEPS))

            def step(carry: Any, factor: jax.Array, tx: optax.GradientTransformation = tx) -> tuple[Any, None]:
                now, state = carry
                updates, state = tx.update(jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state, now)
                return (optax.apply_updates(now, updates), state), None

            (ended, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(STEPS))
            results[name] = jax.tree.map(jnp.subtract, ended, params)
        return results

    results = run(params, grads)
    return {name: _arrays(results[name]) for name in OPTIMIZERS}


def torch_updates(name: str, params: Params, grads: Params, **options: Any) -> dict[str, np.ndarray]:
    """By path, what torchref's optimizer adds to the parameters; `options` replace its own."""
    import torchref

    kinds = dict(by_path(kinds_like(params)))
    start, slopes = ({path: to_tensor(leaf) for path, leaf in by_path(tree).items()} for tree in (params, grads))
    parts = {path: [p.clone().requires_grad_() for p in _matrices(start[path], kinds[path])] for path in start}
    leaves = [(kinds[path].name, part) for path in parts for part in parts[path]]
    optimizer = torch_optimizer(OPTIMIZERS[name], leaves, **options)
    for factor in STEPS:
        clipped = torchref.optim.clip_by_global_norm([g * factor for g in slopes.values()], CLIP_NORM)
        for path, grad in zip(slopes, clipped, strict=True):
            for part, slope in zip(parts[path], _matrices(grad, kinds[path]), strict=True):
                part.grad = slope.clone()
        optimizer.step()
    ended = {path: _joined([p.detach() for p in parts[path]], start[path], kinds[path]) for path in start}
    return {path: to_array(ended[path] - start[path]) for path in start}


def torch_optimizer(
    cfg: OptimConfig, leaves: Sequence[tuple[str, "torch.Tensor"]], **options: Any
) -> "torch.optim.Optimizer":
    """torchref's optimizer for a config, at its peak rate and without its clipping; `options` replace its own.

    Args:
      leaves: each parameter after the name of its kind; it is grouped by that as torchref's docstrings say.
    """
    import torchref

    linear, tables, vectors = (
        [leaf for kind, leaf in leaves if kind in names] for names in (("linear",), ("embedding",), ("norm", "bias"))
    )
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


def _matrices(leaf: "torch.Tensor", kind: ParamKind) -> list["torch.Tensor"]:
    """A leaf as torch has it: a linear map as (out, in), each head's own apart."""
    if kind.name != "linear":
        return [leaf]
    wide = leaf.movedim((*kind.outputs, *kind.inputs), tuple(range(-len(kind.outputs) - len(kind.inputs), 0)))
    outputs = 1 if not kind.outputs else leaf.shape[kind.outputs[0]]
    return list(wide.reshape(-1, outputs, leaf.shape[kind.inputs[0]]).unbind())


def _joined(parts: list["torch.Tensor"], like: "torch.Tensor", kind: ParamKind) -> "torch.Tensor":
    """The inverse of `_matrices`."""
    import torch

    if kind.name != "linear":
        return parts[0]
    to = tuple(range(-len(kind.outputs) - len(kind.inputs), 0))
    turned = like.movedim((*kind.outputs, *kind.inputs), to)
    return torch.stack(parts).reshape(turned.shape).movedim(to, (*kind.outputs, *kind.inputs))


def _arrays(tree: Params) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}
