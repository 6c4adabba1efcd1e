"""Single float32 steps from the same state: jaxlm's and PyTorch's errors against float64."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tolerances import assert_float32_as_good
from trajectories import turned

import torchref
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.optim import adafactor, adam, adamsn, adamw, relative_step, scale_by_adam, sgd
from jaxlm.optim.adafactor import Factored

SHAPES = {"kernel": (30, 20), "bias": (50,)}
SEEDS, STEPS = 4, 6
EPS = float(np.finfo(np.float32).eps)

MOMENTS = {"m": "momentum_buffer", "u": "exp_avg", "v": "exp_avg_sq"}
FACTORS = {"rows": "row_var", "columns": "col_var", "v": "variance"}
PAPER = {"decay_exponent": 0.8, "clipping_threshold": 1, "multiply_by_parameter_scale": True}
FLOOR = PAPER | {"eps": EPS, "eps_placement": "floor"}


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer in jaxlm, torchref and, if it has one, PyTorch, with PyTorch's names for torchref's state."""

    ours: optax.GradientTransformation
    reference: Callable
    torch: Callable | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)


def made(kind, *positional, **options):
    return lambda kernel, bias: kind([kernel, bias], *positional, **options)


def subset_norm(kernel, bias):
    groups = [{"params": [kernel]}, {"params": [bias], "lr": 1e-2, "linear": False}]
    return torchref.optim.AdamSN(groups, 0.1, subset="per_output")


CASES = {
    "sgd": Case(sgd(0.1, 0.9), made(torchref.optim.SGD, 0.1, 0.9), made(torch.optim.SGD, 0.1, 0.9), MOMENTS),
    "adam": Case(adam(1e-2), made(torchref.optim.Adam, 1e-2), made(torch.optim.Adam, 1e-2), MOMENTS),
    "adam, eps inside": Case(
        adam(1e-2, eps_placement="inside"), made(torchref.optim.Adam, 1e-2, eps_placement="inside")
    ),
    "adamw": Case(
        adamw(1e-2, weight_decay=0.5, mask=True),
        made(torchref.optim.AdamW, 1e-2, weight_decay=0.5),
        made(torch.optim.AdamW, 1e-2, weight_decay=0.5),
        MOMENTS,
    ),
    "adamsn": Case(adamsn(0.1, subset="per_output"), subset_norm),
    "adafactor": Case(adafactor(1e-2), made(torchref.optim.Adafactor, 1e-2)),
    "torch.optim.Adafactor": Case(
        adafactor(relative_step(0.3), **FLOOR),
        made(torchref.optim.Adafactor, 0.3, **FLOOR),
        made(torch.optim.Adafactor, 0.3),
        FACTORS,
    ),
}


def torch_steps(make, start, grads, dtype, states=None):
    """(parameters, states), both by name, after a step for each of `grads`, from `states` if given."""
    params = {name: torch.nn.Parameter(to_tensor(turned(name, x)).to(dtype)) for name, x in start.items()}
    optimizer = make(**params)
    for name, p in params.items():
        optimizer.state[p].update(states[name] if states else {})
    for grad in grads:
        for name, p in params.items():
            p.grad = to_tensor(turned(name, grad[name])).to(dtype)
        optimizer.step()
    after = {name: turned(name, to_array(p)) for name, p in params.items()}
    return after, {name: optimizer.state[p] for name, p in params.items()}


def cast(states, dtype, names=None):
    """torchref's states in another type and, if given, under PyTorch's names."""
    out = {}
    for leaf, state in states.items():
        arrays = {(names or {}).get(name, name): x.to(dtype, copy=True) for name, x in state.items() if name != "step"}
        step = {"step": torch.tensor(float(state["step"])) if names else state["step"]} if state else {}
        out[leaf] = arrays | step
    return out


def jax_state(tx, start, states):
    """The state of `tx` that holds the numbers of torchref's `states`."""
    first, second = {}, {}
    for leaf, state in states.items():
        arrays = {name: turned(leaf, to_array(x)) for name, x in state.items() if name != "step"}
        first[leaf] = arrays.get("u", arrays.get("m"))
        # jaxlm's rows are of inputs, torch's of outputs.
        second[leaf] = Factored(arrays["columns"], arrays["rows"]) if "rows" in arrays else arrays.get("v")
    state = tx.init(jax.tree.map(jnp.asarray, start))
    if not states["bias"]:
        return state
    new = {"count": np.int32(states["bias"]["step"]), "mu": first, "nu": second}
    new = {name: x for name, x in new.items() if optax.tree_utils.tree_get_all_with_path(state, name)}
    return optax.tree_utils.tree_set(state, **new)


@jax.jit
def jax_steps(states, params, grads):
    """The parameters after one step of each of CASES."""
    updates = {name: case.ours.update(grads, states[name], params)[0] for name, case in CASES.items()}
    return {name: optax.apply_updates(params, update) for name, update in updates.items()}


def normals(rng, size=1.0):
    return {name: size * rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@functools.cache
def results():
    """The parameters after step t in JAX, torch and float64, each [seeds, ...], by (t, case, leaf)."""
    out = {}
    for seed, before in itertools.product(range(SEEDS), (0, STEPS - 1)):
        rng = np.random.default_rng(seed)
        start = normals(rng, np.float32(1e-2))  # as small as the steps: rounding hides little of them
        earlier, now = [normals(rng) for _ in range(before)], [normals(rng)]
        states, theirs, truths = {}, {}, {}
        for name, case in CASES.items():
            _, state = torch_steps(case.reference, start, earlier, torch.float64)
            state = cast(state, torch.float32)
            states[name] = jax_state(case.ours, start, state)
            truths[name] = torch_steps(case.reference, start, now, torch.float64, cast(state, torch.float64))[0]
            theirs[name] = torch_steps(
                case.torch or case.reference, start, now, torch.float32, cast(state, torch.float32, case.names)
            )[0]
        ours = jax_steps(states, start, now[0])
        for name, leaf in itertools.product(CASES, SHAPES):
            three = (np.asarray(ours[name][leaf]), theirs[name][leaf], truths[name][leaf])
            out.setdefault((before + 1, name, leaf), []).append(three)
    return {key: [np.stack(x) for x in zip(*threes, strict=True)] for key, threes in out.items()}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("t", [1, STEPS])
def test_a_float32_step_is_as_exact_as_torchs(name, t):
    for leaf in SHAPES:
        assert_float32_as_good(*results()[t, name, leaf])


def test_the_bias_correction_keeps_float32s_precision():
    """At t = 1 the corrected second moment is g^2; Optax's is off by 1e-5."""

    def error(tx, g):
        update, _ = tx.update(g, tx.init(g))
        return np.max(np.abs(np.asarray(g, np.float64) ** 2 / np.asarray(update, np.float64) ** 2 / g**2 - 1))

    g = jnp.linspace(0.5, 2, 7)
    assert error(scale_by_adam(0, 0.999, 0), g) < 1e-6
    assert 1e-5 < error(optax.scale_by_adam(0, 0.999, 0), g) < 2e-5
