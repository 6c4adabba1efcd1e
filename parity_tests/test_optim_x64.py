"""Trajectories of every optimizer on given gradients, in float64: jaxlm, Optax, PyTorch, Hugging Face and torchref."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from tolerances import FLOAT64, OPTAX_ADAFACTOR, OPTAX_ADAFACTOR_STEP, assert_close
from trajectories import NAMES, STEPS, jax_paths, on_all, on_groups, scheduled, subset_norm, torch_path

import torchref
from jaxlm.config import OptimConfig
from jaxlm.optim import adafactor, adam, adamsn, adamw, build_schedule, relative_step, sgd

pytestmark = pytest.mark.x64
EXACT = 1e-12
"""The same sums in another order."""


@dataclasses.dataclass(frozen=True)
class Equal:
    """Optimizers that must give the same trajectory."""

    ours: optax.GradientTransformation
    torchref: Callable
    torch: Callable | None = None
    """A PyTorch or Hugging Face optimizer."""
    optax: Any = None


def warm_up_and_cosine(t):
    if t < 9:
        return 0.02 * (t + 1) / 10
    return 0.002 + (0.02 - 0.002) * (1 + np.cos(np.pi * (t - 9) / (STEPS - 9))) / 2


SCHEDULE = build_schedule(OptimConfig(learning_rate=0.02, warmup_steps=9, schedule="cosine", min_lr_ratio=0.1), STEPS)

SGD = {
    "sgd": Equal(sgd(0.1), on_all(torchref.optim.SGD, 0.1), on_all(torch.optim.SGD, 0.1), optax.sgd(0.1)),
    "sgd with momentum": Equal(
        sgd(0.1, 0.9),
        on_all(torchref.optim.SGD, 0.1, 0.9),
        on_all(torch.optim.SGD, 0.1, 0.9),
        optax.sgd(0.1, 0.9),
    ),
    "sgd with Nesterov's momentum": Equal(
        sgd(0.1, 0.9, nesterov=True),
        on_all(torchref.optim.SGD, 0.1, 0.9, nesterov=True),
        on_all(torch.optim.SGD, 0.1, 0.9, nesterov=True),
        optax.sgd(0.1, 0.9, nesterov=True),
    ),
    "sgd with decay": Equal(
        sgd(0.1, weight_decay=0.2),
        on_groups(torchref.optim.SGD, 0.1, 0.2),
        on_groups(torch.optim.SGD, 0.1, 0.2),
    ),
    "sgd with momentum and decay": Equal(
        sgd(0.1, 0.9, weight_decay=0.2), on_groups(torchref.optim.SGD, 0.1, 0.2, momentum=0.9)
    ),
}

MOMENTS = {"beta": 0.8, "gamma": 0.95, "eps": 1e-7}
ADAM = {
    "adam": Equal(adam(1e-2), on_all(torchref.optim.Adam, 1e-2), on_all(torch.optim.Adam, 1e-2), optax.adam(1e-2)),
    "adam with other constants": Equal(
        adam(1e-2, 0.8, 0.95, 1e-7),
        on_all(torchref.optim.Adam, 1e-2, **MOMENTS),
        on_all(torch.optim.Adam, 1e-2, (0.8, 0.95), 1e-7),
        optax.adam(1e-2, 0.8, 0.95, 1e-7),
    ),
    "adamw": Equal(
        adamw(1e-2, weight_decay=0.1, mask=True),
        on_all(torchref.optim.AdamW, 1e-2, weight_decay=0.1),
        on_all(torch.optim.AdamW, 1e-2, weight_decay=0.1),
        optax.adamw(1e-2, weight_decay=0.1),
    ),
    "adamw on matrices": Equal(
        adamw(1e-2),
        on_groups(torchref.optim.AdamW, 1e-2, 1e-2),
        on_groups(torch.optim.AdamW, 1e-2, 1e-2),
    ),
    "adamw with a schedule": Equal(
        adamw(SCHEDULE, weight_decay=0.1, mask=True),
        scheduled(on_all(torchref.optim.AdamW, weight_decay=0.1), warm_up_and_cosine),
        scheduled(on_all(torch.optim.AdamW, weight_decay=0.1), warm_up_and_cosine),
        optax.adamw(SCHEDULE, weight_decay=0.1),
    ),
} | {
    f"adam, eps {place}, {'not ' * (not corrected)}corrected": Equal(
        adam(1e-2, eps=1e-6, eps_placement=place, bias_correction=corrected),
        on_all(torchref.optim.Adam, 1e-2, eps=1e-6, eps_placement=place, bias_correction=corrected),
    )
    for place, corrected in [("uncorrected", True), ("inside", True), ("inside", False), ("outside", False)]
}

ADAMSN = {
    str(options): Equal(adamsn(1e-2, **options), subset_norm(**options))
    for options in [
        {},
        {"subset": "per_output"},
        {"subset": "per_input", "weight_decay": 0.2},
        {"subset": "auto", "eps_placement": "uncorrected", "eps": 1e-6},
        {"subset": "smaller", "weight_decay": 0.2},
        {"subset": "per_output", "subset_size": 2, "eps_placement": "inside"},
        {"subset": "per_input", "subset_size": 2, "eps_placement": "inside", "bias_correction": False},
        {"subset": "auto", "subset_size": 2, "bias_correction": False},
        {"subset": "smaller", "subset_size": 2},
    ]
} | {
    "adamsn with another ratio": Equal(
        adamsn(1e-2, weight_decay=0.2, mask=True, adam_lr_ratio=0.3),
        lambda named: torchref.optim.AdamSN(
            [
                {"params": [p for name, p in named.items() if name.endswith("kernel")]},
                {"params": [p for name, p in named.items() if not name.endswith("kernel")], "linear": False}
                | {"lr": 3e-3, "weight_decay": 0.2},
            ],
            1e-2,
            weight_decay=0.06,
        ),
    ),
    "adamsn of single entries is adam": Equal(
        adamsn(1e-2, subset_size=1, adam_lr_ratio=1),
        on_all(torchref.optim.AdamSN, 1e-2, subset_size=1),
        on_all(torch.optim.Adam, 1e-2),
        optax.adam(1e-2),
    ),
}


def factored(rate, torch_rate=None, factors="last", **options):
    """Adafactor in jaxlm, with decay everywhere, and in torchref with the same options; `torch_rate` is a schedule."""
    names = {"b2": "gamma", "weight_decay_rate": "weight_decay_lr"}
    renamed = {names.get(name, name): value for name, value in options.items()}
    reference = on_all(torchref.optim.Adafactor, 1.0 if torch_rate else rate, **renamed)
    return (
        adafactor(rate, mask=True, factors=factors, **options),
        scheduled(reference, torch_rate) if torch_rate else reference,
    )


def relative(largest):
    """The paper's relative step as a function of t = 0, 1, ..."""
    return lambda t: min(largest, (t + 1) ** -0.5)


PAPER = {"decay_exponent": 0.8, "clipping_threshold": 1, "multiply_by_parameter_scale": True}
SQUARES = PAPER | {"eps": 1e-30, "eps_placement": "squares"}
FLOOR = PAPER | {"eps": np.finfo(np.float64).eps, "eps_placement": "floor"}
OTHER = {"eps": 1e-7, "decay_exponent": 0.7, "clipping_threshold": 0.5, "min_parameter_scale": 0.5}

ADAFACTOR = {
    "adafactor": Equal(*factored(1e-2)),
    "adafactor of the course": Equal(*factored(1e-2, b2=0.9, eps=1e-6, weight_decay=0.1, bias_correction=False)),
    "adafactor with everything": Equal(
        *factored(
            1e-2,
            eps=1e-6,
            eps_placement="squares",
            momentum=0.9,
            clipping_threshold=0.5,
            multiply_by_parameter_scale=True,
            weight_decay=0.1,
        )
    ),
    "adafactor on matrices": Equal(
        adafactor(1e-2, weight_decay=0.1), on_groups(torchref.optim.Adafactor, 1e-2, weight_decay=0.1)
    ),
    "optax.adafactor": Equal(
        *factored(1e-3, factors="largest", min_dim_size_to_factor=128, **SQUARES), optax=optax.adafactor(1e-3)
    ),
    "optax.adafactor, factored": Equal(
        *factored(1e-3, factors="largest", **SQUARES), optax=optax.adafactor(1e-3, min_dim_size_to_factor=1)
    ),
    "optax.adafactor with decay and momentum, factored from 7 on": Equal(
        *factored(
            1e-3,
            factors="largest",
            min_dim_size_to_factor=7,
            weight_decay=0.01,
            weight_decay_rate=1,
            momentum=0.9,
            **SQUARES,
        ),
        optax=optax.adafactor(
            1e-3, min_dim_size_to_factor=7, momentum=0.9, dtype_momentum="float64", weight_decay_rate=0.01
        ),
    ),
    "torch.optim.Adafactor": Equal(
        *factored(relative_step(0.3), relative(0.3), **FLOOR), torch=on_all(torch.optim.Adafactor, 0.3)
    ),
    "torch.optim.Adafactor with decay and a high floor": Equal(
        *factored(relative_step(0.3), relative(0.3), weight_decay=0.1, weight_decay_rate=0.3, **FLOOR | {"eps": 1e-3}),
        torch=on_all(torch.optim.Adafactor, 0.3, eps=(1e-3, 1e-3), weight_decay=0.1),
    ),
    "transformers.Adafactor": Equal(
        *factored(relative_step(), relative(1e-2), **SQUARES), torch=on_all(transformers.Adafactor)
    ),
    "transformers.Adafactor, warming up": Equal(
        *factored(relative_step(warmup_init=True), lambda t: 1e-6 * (t + 1), **SQUARES),
        torch=on_all(transformers.Adafactor, warmup_init=True),
    ),
    "transformers.Adafactor with a rate": Equal(
        *factored(1e-2, **SQUARES | {"multiply_by_parameter_scale": False}),
        torch=on_all(transformers.Adafactor, 1e-2, scale_parameter=False, relative_step=False),
    ),
    "transformers.Adafactor with momentum, decay and other constants": Equal(
        *factored(relative_step(), relative(1e-2), weight_decay=0.1, momentum=0.9, **SQUARES | OTHER),
        torch=on_all(
            transformers.Adafactor, eps=(1e-7, 0.5), clip_threshold=0.5, decay_rate=-0.7, beta1=0.9, weight_decay=0.1
        ),
    ),
}

EQUAL = SGD | ADAM | ADAMSN | ADAFACTOR


@pytest.fixture(scope="module")
def paths():
    """The trajectories of all Optax transformations, from one compilation."""
    ours = {name: equal.ours for name, equal in EQUAL.items()}
    theirs = {f"optax: {name}": equal.optax for name, equal in EQUAL.items() if equal.optax is not None}
    return jax_paths(ours | theirs)


@pytest.mark.parametrize("name", list(EQUAL))
def test_optimizers_are_equal(name, paths):
    equal = EQUAL[name]
    reference = torch_path(equal.torchref)
    pairs = [(paths[name], reference)]
    if equal.torch is not None:
        library = torch_path(equal.torch)
        pairs += [(reference, library), (paths[name], library)]
    for leaf in NAMES:
        for one, other in pairs:
            assert_close(one[leaf], other[leaf], FLOAT64)
        if equal.optax is not None:
            tolerance = FLOAT64
            if name in ADAFACTOR:  # the bias, which begins at 0, is nothing but steps
                tolerance = OPTAX_ADAFACTOR_STEP if leaf == "tall/bias" else OPTAX_ADAFACTOR
            assert_close(paths[name][leaf], paths[f"optax: {name}"][leaf], tolerance)


@pytest.mark.parametrize("subset", ["per_output", "per_input", "auto", "smaller"])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 4)])
def test_the_reference_sums_the_second_moments_of_torchs_adam(subset, size, shape):
    """v is linear in g^2, so AdamSN's is the sum of the v that torch's Adam keeps for each entry."""
    rng = np.random.default_rng(0)
    weight, beside = (torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))
    ours = torchref.optim.AdamSN([weight], 0.1, 0.8, 0.9, 1e-2, subset=subset, subset_size=size)
    adam = torch.optim.Adam([beside], 0.1, (0.8, 0.9), 1e-2)
    for t in range(1, 6):
        before = weight.detach().clone()
        weight.grad = beside.grad = torch.tensor(rng.standard_normal(shape))
        ours.step()
        adam.step()
        v, (outputs, inputs) = adam.state[beside]["exp_avg_sq"], shape
        if subset in ("per_output", "auto" if outputs >= inputs else "smaller"):
            v = v.view(outputs, -1, size or inputs).sum(2, keepdim=True).expand(-1, -1, size or inputs)
        else:
            v = v.view(-1, size or outputs, inputs).sum(1, keepdim=True).expand(-1, size or outputs, -1)
        root = (v.reshape(shape) / (1 - 0.9**t)).sqrt() + 1e-2
        step = 0.1 * adam.state[beside]["exp_avg"] / (1 - 0.8**t) / root
        assert_close(before - weight.detach(), step, FLOAT64)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 4), (1, 5), (7, 2)])
def test_the_smaller_subset_is_the_written_out_rule(shape):
    """Six steps of the rule in NumPy, on torch's weight (out, in)."""
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(shape), rng.standard_normal((6, *shape))
    weight, u, v, reduce_dim = start, 0.0, 0.0, 0 if shape[0] >= shape[1] else 1
    for t, g in enumerate(grads, 1):
        u = 0.9 * u + 0.1 * g
        v = 0.99 * v + 0.01 * (g**2).sum(reduce_dim, keepdims=True)
        weight = weight - 0.1 * (u / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    assert v.size == min(shape)

    tx = adamsn(0.1, 0.9, 0.99, subset="smaller")
    params = {"kernel": jnp.asarray(start.T)}
    state = tx.init(params)
    ours = torch.nn.Parameter(torch.tensor(start))
    reference = torchref.optim.AdamSN([ours], 0.1, 0.9, 0.99, subset="smaller")
    for g in grads:
        updates, state = tx.update({"kernel": jnp.asarray(g.T)}, state, params)
        params = optax.apply_updates(params, updates)
        ours.grad = torch.tensor(g)
        reference.step()
    assert np.ptp(weight - start) > 0.1
    assert_close(params["kernel"].T, weight, EXACT)
    assert_close(ours.detach(), weight, EXACT)
    assert reference.state[ours]["v"].numel() == min(shape)


def test_a_map_of_one_input_has_adams_second_moment():
    ours, theirs = (torch.nn.Parameter(torch.ones((5, 1), dtype=torch.float64)) for _ in range(2))
    optimizers = torchref.optim.AdamSN([ours], 0.1), torch.optim.Adam([theirs], 0.1)
    for t in range(5):
        ours.grad = theirs.grad = torch.linspace(-1, 2, 5, dtype=torch.float64)[:, None] ** (t + 1)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(ours.detach(), theirs.detach(), FLOAT64)
