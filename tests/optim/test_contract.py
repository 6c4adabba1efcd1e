"""What every optimizer promises: it converges, compiles once, gives buffers back, keeps types and stays finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import APART, GRID, after, assert_trees_close, compiled, every, leaves, make, numbers, trajectory
from tolerances import FLOAT32, assert_close

from jaxlm.optim import adafactor, adam, adamsn, adamw, scale_by_adam, scale_by_factored_rms, sgd


def avals(tree):
    """What jit tells arrays apart by."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# Convergence

BOWL = {"kernel": (3, 5), "bias": (7,)}
VALLEYS = {"kernel": (3, 2)}  # three of Rosenbrock's, a row each
STEPS = 4000


def bowl(params):
    """A quadratic whose curvatures lie between 1 and 9, its minimum 0 away from the origin."""
    parts = zip(jax.tree.leaves(params), jax.tree.leaves(numbers(1, shapes=BOWL)), strict=True)
    return sum((jnp.linspace(1, 9, p.size) * (p - target).ravel() ** 2).sum() / 2 for p, target in parts)


def valleys(params):
    x, y = params["kernel"].T
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).sum()


RATES = {
    "sgd": (0.1, 1e-3),
    "momentum": (0.02, 3e-4),
    "nesterov": (0.02, 3e-4),
    "adamsn": (0.3, 0.1),
    "scale_by_adamsn": (0.3, 0.1),
}
"""Peak rates for (the bowl, the valleys); 0.05 for those not here."""


@every
def test_it_finds_the_minimum_of_a_quadratic_and_of_rosenbrocks_function(name):
    """Without decay, the rate falling to 0, for sign-like steps would else circle the minimum."""

    def minimum(loss, start, peak):
        none = {"weight_decay": 0.0} if "weight_decay" in GRID[name][1] else {}
        tx = make(name, optax.linear_schedule(peak, 0.0, STEPS), **none)

        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return loss(jax.lax.fori_loop(0, STEPS, step, (start, tx.init(start)))[0])

    starts = numbers(2, shapes=BOWL), {"kernel": jnp.array([[-1.0, 1.0], [0.0, 0.5], [1.5, 1.0]])}
    peaks = RATES.get(name, (0.05, 0.05))
    ends = compiled(lambda: (minimum(bowl, starts[0], peaks[0]), minimum(valleys, starts[1], peaks[1])))()
    assert float(ends[0]) < 1e-10 * float(bowl(starts[0]))
    assert float(ends[1]) < 1e-3 * float(valleys(starts[1]))


# One compilation, and donated buffers


@functools.cache
def stepper(name):
    """(tx, a compiled step that takes over the parameters and the state), the rate a schedule."""
    tx = make(name, optax.linear_schedule(0.1, 0.0, 10))

    @functools.partial(compiled, donate_argnums=(1, 2))
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return tx, step


@every
def test_the_second_step_does_not_compile(name):
    tx, step = stepper(name)
    state, compilations, sizes = tx.init(numbers(0)), [], []
    for _ in range(3):
        _, state, updates = step(numbers(1), numbers(0), state)
        compilations.append(step._cache_size())
        sizes.append(float(abs(updates["gain"])))
    assert compilations[0] == compilations[1] == compilations[2]
    assert len(set(sizes)) == 3  # the rate is another at each step


@every
@pytest.mark.parametrize("dtype", [np.float32, None], ids=["arrays", "weak_types"])
def test_the_second_step_is_given_what_the_first_was(name, dtype):
    """The same shapes, types and weak types, by which jit tells arguments apart."""
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0, dtype), numbers(0))  # without a type: weakly typed
    assert all(leaf.weak_type == (dtype is None) for leaf in jax.tree.leaves(params))
    state, new, *_ = after(make(name), params, params)
    assert avals(state) == avals(new)


@every
def test_a_step_takes_over_the_buffers_of_parameters_and_state(name):
    tx, step = stepper(name)
    params, grads = numbers(0), numbers(1)
    for init in (tx.init, compiled(tx.init)):  # a compiled init might give one buffer twice
        state = init(params)
        old = jax.tree.leaves((params, state))
        params, state, _ = step(grads, params, state)
        assert all(leaf.is_deleted() for leaf in old)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((grads, params, state)))


# Types and structure


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_float32_updates_and_parameters_are_as_given(name, dtype):
    params = numbers(0, dtype=dtype)
    state, _, updates, moved = after(make(name), params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    for tree in (updates, moved):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    _, _, updates, moved = after(make(name), params, numbers(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}  # as the gradients are
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "name", ["momentum", "nesterov", "adam", "adamw", "adamsn", "adafactor_paper", "scale_by_adam", "scale_by_adamsn"]
)
def test_mu_dtype_is_that_of_the_first_moment_and_of_nothing_else(name):
    plain, _, plain_updates, _ = after(make(name), numbers(0), numbers(0))
    state, new, updates, _ = after(make(name, mu_dtype=jnp.bfloat16), numbers(0), numbers(0))
    first = {path for path in leaves(state) if ".mu[" in path}
    assert len(first) == 4
    for path, leaf in leaves(state).items():
        assert leaf.dtype == (jnp.bfloat16 if path in first else leaves(plain)[path].dtype)
        assert leaves(new)[path] == leaf
    assert jax.tree.leaves(updates) == jax.tree.leaves(plain_updates)


def test_bfloat16_parameters_have_the_moments_and_the_updates_of_float32_ones():
    """After 30 steps, where a moment kept or summed in bfloat16 would be off by 1e-2."""
    narrow = numbers(0, dtype=jnp.bfloat16), numbers(1, 30, dtype=jnp.bfloat16)

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def both(tx):
        return [trajectory(tx, *trees, move=False)[1:] for trees in (narrow, wide(narrow))]

    results = compiled(lambda: {name: both(make(name)) for name in APART})()
    for name, ((state, updates), (wide_state, wide_updates)) in results.items():
        assert_trees_close(state, wide_state, 2**-8 if name == "adafactor_paper" else FLOAT32)  # averages rounded steps
        assert_trees_close(wide(updates), wide_updates, 2**-7)


def test_moments_are_of_the_gradients_as_they_are_when_run_eagerly():
    """One operation at a time, where a compiler cannot leave out a rounding to bfloat16 on the way."""
    grads = {"kernel": numbers(1, dtype=jnp.bfloat16, shapes=(3, 5))}
    for scale_by, sizes in ((scale_by_adam, ()), (scale_by_factored_rms, (1, 0))):
        state = scale_by(b2=0.5).update(grads, scale_by().init(grads))[1]
        squares = np.asarray(grads["kernel"], np.float64) ** 2 / 2
        means = [squares.mean(axis, keepdims=True) for axis in sizes] or [squares]
        for found, expected in zip(jax.tree.leaves(state.nu), means, strict=True):
            assert_close(found, expected, FLOAT32)


# The first step in numbers


def test_the_first_step_in_numbers():
    """Gradients of another size in each column of the kernel; each formula's first step by hand."""
    g, p = np.array([[0.3, 4.0], [-0.1, 3.0]]), np.array([[1.0, 2.0], [-3.0, 1.0]])
    columns, rows = np.sqrt((g**2).sum(0, keepdims=True)), np.sqrt((g**2).sum(1, keepdims=True))
    factored = g / np.sqrt((g**2).mean(1, keepdims=True) * (g**2).mean(0, keepdims=True) / (g**2).mean())

    def rms(x):
        return np.sqrt((x**2).mean())

    expected = {
        "sgd": (sgd(0.1), g, g),
        "nesterov": (sgd(0.1, 0.9, nesterov=True), 1.9 * g, 1.9 * g),
        "decay": (sgd(0.1, weight_decay=0.5), g + 0.5 * p, g),
        "adamw": (adamw(0.1, weight_decay=0.5), np.sign(g) + 0.5 * p, np.sign(g)),
        "adamsn": (adamsn(0.1, weight_decay=0.5), g / columns + 0.05 * p, 0.1 * np.sign(g)),
        "adamsn_per_input": (adamsn(0.1, subset="per_input"), g / rows, 0.1 * np.sign(g)),
        "adafactor": (adafactor(0.1), factored, np.sign(g)),
        "clipped": (adafactor(0.1, clipping_threshold=0.5), factored * 0.5 / rms(factored), 0.5 * np.sign(g)),
        "scaled": (adafactor(0.1, multiply_by_parameter_scale=True), factored * rms(p), np.sign(g) * rms(p[0])),
        "averaged": (adafactor(0.1, momentum=0.75), factored / 4, np.sign(g) / 4),
    }
    params, grads = ({"kernel": jnp.asarray(x, np.float32), "scale": jnp.asarray(x[0], np.float32)} for x in (p, g))
    txs = {name: tx for name, (tx, *_) in expected.items()}
    found = compiled(lambda: {name: tx.update(grads, tx.init(params), params)[0] for name, tx in txs.items()})()
    for name, (_, kernel, scale) in expected.items():
        assert_close(found[name]["kernel"], -0.1 * kernel, FLOAT32)
        assert_close(found[name]["scale"], -0.1 * scale[0], FLOAT32)


# Gradients of zero

ZERO_GRID = {
    **{name: make(name, **({"weight_decay": 0.0} if "weight_decay" in GRID[name][1] else {})) for name in GRID},
    "adam_inside": adam(0.05, eps_placement="inside"),
    "adam_uncorrected": adam(0.05, eps_placement="uncorrected"),
    "adafactor_squares": adafactor(0.05, eps=1e-30, eps_placement="squares"),
    "adafactor_text": adafactor(0.05, bias_correction=False),
}


def test_gradients_of_zero_give_updates_of_zero():
    """All zero at two steps, then but for a row and a column of the kernel, then all zero again."""
    shapes = {"kernel": (3, 5), "bias": (7,)}
    kernel, bias = numbers(1, shapes=(3, 5)), numbers(1, shapes=(7,))
    grads = {"kernel": kernel.at[1].set(0).at[:, 2].set(0), "bias": bias}
    grads = jax.tree.map(lambda g: jnp.stack([0 * g, 0 * g, g, 0 * g]), grads)
    params = numbers(0, shapes=shapes)
    found = compiled(lambda: {name: trajectory(tx, params, grads)[2] for name, tx in ZERO_GRID.items()})()
    for name, updates in found.items():
        for path, update in leaves(updates).items():
            assert np.isfinite(update).all(), (name, path)
            assert not update[:2].any(), (name, path)
            assert update[2].any(), (name, path)
        kernel = updates["kernel"]
        assert not kernel[:, 1].any(), name
        assert not kernel[:, :, 2].any(), name
