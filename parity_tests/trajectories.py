"""Many steps of an optimizer on given gradients, in JAX and in torch, from the same parameters."""

import itertools

import jax
import numpy as np
import optax
import torch

import torchref
from jaxlm.convert.tensors import to_array, to_tensor

STEPS = 100
SHAPES = {
    "tall": {"kernel": (10, 6), "bias": (6,)},
    "wide": {"kernel": (6, 10)},
    "square": {"kernel": (4, 4)},
    "norm": {"scale": (7,)},
    "embedding": (13, 7),
}
"""Shapes of parameters. jaxlm's kernels are (in, out); torch gets their transposes."""


def is_shape(x):
    return isinstance(x, tuple)


NAMES = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(SHAPES, is_leaf=is_shape)
]


def problem():
    """(parameters, gradients of every step): trees of float64 arrays.

    Each gradient has a size of its own in 1e-6..1e2, growing with time for the kernels, so that eps, the corrections
    and every decay rate show. A bias begins at 0; its first gradient and that of a kernel are 0, and one in the middle.
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda shape: rng.standard_normal(shape), SHAPES, is_leaf=is_shape)
    params["tall"]["bias"][:] = 0

    def gradients(shape):
        sizes = rng.uniform(-6, 2, STEPS)
        sizes = 10 ** (np.sort(sizes) if len(shape) > 1 else sizes)
        return sizes.reshape(-1, *[1] * len(shape)) * rng.standard_normal((STEPS, *shape))

    grads = jax.tree.map(gradients, SHAPES, is_leaf=is_shape)
    grads["tall"]["bias"][0] = 0
    grads["square"]["kernel"][0] = 0
    grads["tall"]["kernel"][STEPS // 2] = 0
    return params, grads


PARAMS, GRADS = problem()


def turned(name, x):
    """Transposes a kernel, or a kernel at every step; leaves any other array as it is."""
    return np.swapaxes(x, -1, -2) if name.endswith("kernel") else x


def torch_path(make):
    """Every parameter after each step of the torch optimizer `make(parameters by name)`."""
    start, grads = (dict(zip(NAMES, jax.tree.leaves(tree), strict=True)) for tree in (PARAMS, GRADS))
    named = {name: torch.nn.Parameter(to_tensor(turned(name, value))) for name, value in start.items()}
    optimizer, path = make(named), {name: [] for name in named}
    for t in range(STEPS):
        for name, p in named.items():
            p.grad = to_tensor(turned(name, grads[name][t]))
        optimizer.step()
        for name, p in named.items():
            path[name].append(to_array(p))
    return {name: turned(name, np.stack(steps)) for name, steps in path.items()}


def jax_paths(optimizers):
    """The same for Optax optimizers by name, all in one program."""

    @jax.jit
    def run(params, grads):
        def step(carry, grad):
            after = {}
            for name, tx in optimizers.items():
                params, state = carry[name]
                updates, state = tx.update(grad, state, params)
                after[name] = optax.apply_updates(params, updates), state
            return after, {name: params for name, (params, _) in after.items()}

        return jax.lax.scan(step, {name: (params, tx.init(params)) for name, tx in optimizers.items()}, grads)[1]

    paths = run(PARAMS, GRADS)
    return {key: dict(zip(NAMES, map(np.asarray, jax.tree.leaves(path)), strict=True)) for key, path in paths.items()}


def on_all(kind, *positional, **options):
    """A torch optimizer of all parameters in one group."""
    return lambda named: kind(list(named.values()), *positional, **options)


def on_groups(kind, lr, weight_decay, **options):
    """A torch optimizer that decays matrices only."""

    def make(named):
        matrices, vectors = ([p for p in named.values() if (p.ndim > 1) == wanted] for wanted in (True, False))
        decays = {"params": matrices, "weight_decay": weight_decay}
        return kind([decays, {"params": vectors, "weight_decay": 0.0}], lr=lr, **options)

    return make


def scheduled(make, rate):
    """The optimizer that `make` builds, with lr = rate(t) before step t = 0, 1, ..."""

    def make_scheduled(named):
        optimizer, steps = make(named), itertools.count()

        def set_rate(*_):
            now = rate(next(steps))
            for group in optimizer.param_groups:
                group["lr"] = now

        optimizer.register_step_pre_hook(set_rate)
        return optimizer

    return make_scheduled


def subset_norm(lr=1e-2, ratio=0.1, weight_decay=0.0, **options):
    """torchref's AdamSN with the groups of jaxlm.optim.adamsn."""

    def make(named):
        kernels = [p for name, p in named.items() if name.endswith("kernel")]
        vectors = [p for p in named.values() if p.ndim == 1]
        others = {"lr": ratio * lr, "linear": False}
        groups = [
            {"params": kernels, "lr": lr, "weight_decay": ratio * weight_decay},
            {"params": [named["embedding"]], "weight_decay": weight_decay, **others},
            {"params": vectors, "weight_decay": 0.0, **others},
        ]
        return torchref.optim.AdamSN(groups, **options)

    return make
