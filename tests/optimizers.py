"""Every optimizer in a grid, small trees for them, and steps with them: what the tests of optimizers share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.optim import adafactor, adam, adamsn, adamw, scale_by_adam, scale_by_adamsn, scale_by_factored_rms, sgd

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time; the steps of these tests are tiny."""


def descent(scale_by):
    def factory(learning_rate, **options):
        return optax.chain(scale_by(**options), optax.scale_by_learning_rate(learning_rate))

    return factory


PAPER = {"eps": 1e-30, "eps_placement": "squares", "decay_exponent": 0.8, "clipping_threshold": 1.0}
PAPER |= {"multiply_by_parameter_scale": True, "momentum": 0.9}
DECAY = {"weight_decay": 0.1}

GRID = {
    "sgd": (sgd, DECAY),
    "momentum": (sgd, {"momentum": 0.9, **DECAY}),
    "nesterov": (sgd, {"momentum": 0.9, "nesterov": True, **DECAY}),
    "adam": (adam, {}),
    "adamw": (adamw, DECAY),
    "adamsn": (adamsn, DECAY),
    "adafactor": (adafactor, DECAY),
    "adafactor_paper": (adafactor, {**PAPER, **DECAY}),
    "scale_by_adam": (descent(scale_by_adam), {}),
    "scale_by_adamsn": (descent(scale_by_adamsn), {"subset": "per_input"}),
    "scale_by_factored_rms": (descent(scale_by_factored_rms), {"eps_placement": "floor"}),
}
"""(factory of a rate, its options) by name."""
every = pytest.mark.parametrize("name", list(GRID))
APART = [name for name in GRID if name != "nesterov" and not name.startswith("scale_by")]
"""Without those whose state is another's."""

SHAPES = {
    "dense": {"kernel": (3, 5), "bias": (5,)},
    "embedding": (7, 3),
    "gain": (),
}


def make(name, rate=0.05, **options):
    factory, known = GRID[name]
    return factory(rate, **{**known, **options})


def numbers(seed, *lead, shapes=SHAPES, dtype=np.float32):
    """A tree of random arrays with these leading axes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype), shapes, is_leaf=lambda x: type(x) is tuple
    )


def trajectory(tx, params, grads, move=True):
    """(params, state, updates) after a step with each of the stacked gradients; unless they move, at `params`."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates) if move else params, state), updates

    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
    return params, state, updates


def after(tx, params, grads):
    """Shapes of (state, next state, updates, next params)."""

    def step(params, grads):
        state = tx.init(params)
        updates, new = tx.update(grads, state, params)
        return state, new, updates, optax.apply_updates(params, updates)

    return jax.eval_shape(step, params, grads)


def leaves(tree):
    """Leaves by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_trees_close(ours, theirs, tolerance=FLOAT32):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, leaf in leaves(ours).items():
        assert np.isfinite(leaf).all(), path
        assert_close(leaf, leaves(theirs)[path], tolerance)
