"""Optimizers within Optax's wrappers, on a mesh of eight devices, and the bytes they keep."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from optimizers import APART, GRID, assert_trees_close, compiled, make, numbers, trajectory

import jaxlm
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import ParamKind, adafactor, adamsn, adamw, sgd, state_bytes

# Within Optax's wrappers

MATRICES = {"dense": {"kernel": True, "bias": False}, "embedding": True, "gain": False}
KINDS = {  # with the kernel as torch would have it
    "dense": {"kernel": ParamKind("linear", (-1,), (-2,)), "bias": ParamKind("bias")},
    "embedding": ParamKind("embedding"),
    "gain": ParamKind("norm"),
}


def within(name):
    """(factory, options, static arguments of inject_hyperparams); the kinds are of the whole tree."""
    factory, options = GRID[name]
    kinds = {"kinds": KINDS} if factory in (adamsn, adafactor) else {}
    return factory, {**options, **kinds}, ["min_dim_size_to_factor"] if factory is adafactor else []


@pytest.mark.parametrize("name", APART)
def test_it_works_within_the_wrappers_of_optax(name):
    """MultiSteps is given three gradients a step, whose means the others are given."""
    factory, options, static = within(name)
    tx = factory(0.05, **options)
    labels = jax.tree.map(lambda matrix: "ours" if matrix else "other", MATRICES)
    wrappers = {
        "alone": tx,
        "masked": optax.masked(tx, MATRICES),
        "multi_transform": optax.multi_transform({"ours": tx, "other": optax.sgd(0.5)}, labels),
        "inject_hyperparams": optax.inject_hyperparams(factory, static)(0.05, **options),
    }
    params, micro = numbers(0), numbers(1, 6)
    grads = jax.tree.map(lambda g: g.reshape(2, 3, *g.shape[1:]).mean(1), micro)

    def run():
        made = {name: trajectory(tx, params, grads)[2] for name, tx in wrappers.items()}
        return made, trajectory(optax.MultiSteps(tx, 3), params, micro)[2]

    updates, slow = compiled(run)()
    alone = updates["alone"]

    def parts(others):
        return jax.tree.map(lambda matrix, ours, other: ours if matrix else other, MATRICES, alone, others)

    assert_trees_close(updates["masked"], parts(grads))
    assert_trees_close(updates["multi_transform"], parts(jax.tree.map(lambda g: -0.5 * g, grads)))
    assert_trees_close(updates["inject_hyperparams"], alone)
    assert_trees_close(jax.tree.map(lambda u: u[2::3], slow), alone)
    assert all(not u[jnp.array([0, 1, 3, 4])].any() for u in jax.tree.leaves(slow))


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "adamsn", "adafactor_paper"])
def test_injected_hyperparameters_can_be_read_and_changed(name):
    factory, options, static = within(name)
    tx = optax.inject_hyperparams(factory, static)(0.05, **options)
    params, grads = numbers(0), numbers(1)
    found = tx.init(params).hyperparams
    assert float(found["learning_rate"]) == pytest.approx(0.05)
    changes = {"learning_rate": 0.2, "b1": 0.5, "b2": 0.7, "eps": 0.1, "weight_decay": 0.3, "momentum": 0.4}
    changes = {key: value for key, value in changes.items() if key in found}
    assert {"adamw": 5, "momentum": 3}.get(name, len(changes)) == len(changes)

    @compiled
    def run(changed):
        state = tx.update(grads, tx.init(params), params)[1]
        return tx.update(grads, state._replace(hyperparams={**state.hyperparams, **changed}), params)[0]

    @compiled
    def by_hand():
        before = factory(0.05, **options)
        state = before.update(grads, before.init(params), params)[1]
        return factory(**{**options, **changes}).update(grads, state, params)[0]

    assert_trees_close(run(changes), by_hand())


# Sharded arrays


def check_on_eight_devices():
    """In a process of its own: a step over a mesh is that of one device, and what is kept lies as the parameters."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shapes = {"dense": {"kernel": (12, 10), "bias": (10,)}, "embedding": (4, 7)}
    specs = {"dense": {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)}, "embedding": ("fsdp", None)}
    places = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)),
        specs,
        is_leaf=lambda x: type(x) is tuple,
    )
    params, grads = numbers(0, shapes=shapes), numbers(1, shapes=shapes)
    txs = {name: make(name) for name in APART}

    def init(params):
        return {name: tx.init(params) for name, tx in txs.items()}

    @compiled
    def update(grads, states, params):
        return {name: tx.update(grads, states[name], params) for name, tx in txs.items()}

    def check_places(tree, what):
        assert jax.tree.leaves(tree), what
        for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (what, leaf.sharding, place)

    def moments(state):
        """The first moments within a state."""
        return [part.mu for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]

    expected = update(grads, init(params), params)
    params, grads = jax.device_put(params, places), jax.device_put(grads, places)
    eager = init(params)
    for states in (eager, compiled(init)(params)):
        for name, (updates, state) in update(grads, states, params).items():
            check_places(updates, name)
            for mu in moments(state) + moments(eager[name]):
                check_places(mu, name)
            assert_trees_close((updates, state), expected[name])
    assert sum(len(moments(state)) for state in eager.values()) == 5


def test_sharded_parameters_have_the_updates_of_whole_ones():
    tests = Path(__file__).parent
    code = "import checking; checking.install(); import test_within as t; t.check_on_eight_devices()"
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Bytes


def shapes_of(cfg):
    return jax.eval_shape(lambda: init_params(build_model(cfg), jax.random.key(0)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_state_bytes_are_those_of_the_arrays_of_init(scan_layers):
    cfg = dataclasses.replace(jaxlm.preset("tiny").model, scan_layers=scan_layers)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes_of(cfg))
    states = compiled(lambda params: {name: make(name).init(params) for name in APART})(params)
    for name in APART:
        made = sum(leaf.nbytes for leaf in jax.tree.leaves(states[name]))
        assert state_bytes(make(name), params) == state_bytes(make(name), shapes_of(cfg)) == made


def test_adamsn_halves_the_state_of_adamw_and_adafactor_all_but_does_without():
    params = shapes_of(jaxlm.preset("nanogpt-cpu").model)
    moment = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert state_bytes(adamw(0.1), params) == 2 * moment + 4  # a counter
    assert moment < state_bytes(adamsn(0.1), params) < 0.55 * 2 * moment
    assert state_bytes(adamsn(0.1, mu_dtype=jnp.bfloat16), params) < 0.3 * 2 * moment
    assert 0 < state_bytes(adafactor(0.1), params) < 0.05 * moment
    assert state_bytes(sgd(0.1), params) == 0


def test_the_bytes_of_a_small_tree_by_hand():
    params = numbers(0, shapes={"kernel": (3, 5), "embedding": (7, 2), "bias": (5,)})  # 34 numbers
    assert state_bytes(adamsn(0.1), params) == 4 * (34 + 5 + 14 + 5 + 1)  # a number an output, and a counter
    assert state_bytes(adamsn(0.1, subset="per_input"), params) == 4 * (34 + 3 + 14 + 5 + 1)
    assert state_bytes(adafactor(0.1), params) == 4 * (3 + 5 + 7 + 2 + 5 + 1)  # rows, columns, a counter
    assert state_bytes(adafactor(0.1, momentum=0.9, mu_dtype=jnp.bfloat16), params) == 4 * 23 + 2 * 34
