import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.config import OptimConfig
from jaxlm.optim import build_optimizer, decay_mask

PARAMS = {"kernel": jnp.full((3, 5), 2.0), "scale": jnp.full(5, 2.0)}


def step(grads, **fields):
    tx = build_optimizer(OptimConfig(schedule="constant", warmup_steps=0, **fields), 10)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return updates


def test_only_matrices_decay():
    assert decay_mask(PARAMS) == {"kernel": True, "scale": False}
    updates = step(jax.tree.map(jnp.zeros_like, PARAMS), learning_rate=0.5, weight_decay=0.1)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0)


@pytest.mark.parametrize(("decay", "expected"), [({}, 0.0), ({"weight_decay": 0.1}, -0.5 * 0.1 * 2)])
def test_adam_decays_only_if_asked(decay, expected):
    updates = step(jax.tree.map(jnp.zeros_like, PARAMS), name="adam", learning_rate=0.5, **decay)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)


def test_the_gradient_is_clipped_by_its_global_norm():
    grads = {"kernel": jnp.full((3, 5), 30.0), "scale": jnp.full(5, 40.0)}
    norm = np.sqrt(15 * 900 + 5 * 1600)
    # With eps far above the moments the update is lr * g / eps: it shows the gradient Adam was given.
    clipped = step(grads, learning_rate=1.0, weight_decay=0.0, eps=1e6, clip_norm=3.0)
    plain = step(grads, learning_rate=1.0, weight_decay=0.0, eps=1e6, clip_norm=None)
    np.testing.assert_allclose(clipped["scale"], -40 * 3 / norm / 1e6, rtol=1e-4)
    np.testing.assert_allclose(plain["scale"], -40 / 1e6, rtol=1e-3)


def test_the_update_is_that_of_adamw():
    grads = {"kernel": jnp.full((3, 5), 0.3), "scale": jnp.full(5, -0.2)}
    fields = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-4, "weight_decay": 0.0, "clip_norm": None}
    # The first bias-corrected step is lr * g / (|g| + eps).
    np.testing.assert_allclose(step(grads, **fields)["kernel"], -0.1 * 0.3 / (0.3 + 1e-4), rtol=1e-5)
    tx = build_optimizer(OptimConfig(schedule="constant", warmup_steps=0, **fields), 10)
    state, params = tx.init(PARAMS), PARAMS
    for scale in (1.0, -2.0):
        updates, state = tx.update(jax.tree.map(lambda g, s=scale: s * g, grads), state, params)
        params = optax.apply_updates(params, updates)
    u, v = 0.8 * 0.2 * 0.3 + 0.2 * -0.6, 0.9 * 0.1 * 0.09 + 0.1 * 0.36
    expected = -0.1 * (u / (1 - 0.8**2)) / (np.sqrt(v / (1 - 0.9**2)) + 1e-4)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lino"}, "optim.name = 'lino' is not an optimizer of jaxlm or Optax.*such as lion"),
        ({"name": "scale_by_adam"}, "is not an optimizer"),
        ({"name": "schedule_free_adamw"}, "evaluates other parameters"),
        ({"name": "lbfgs"}, "'lbfgs' does not run .* 'value'.*: choose another"),
        (
            {"name": "sgd", "arguments": ("momentun=0.9",)},
            "argument 'momentun' of sgd is unknown: choose one of momentum",
        ),
        ({"name": "sgd", "arguments": ("momentum",)}, "argument 'momentum' of sgd has no value: give momentum=VALUE"),
        ({"arguments": ("b1=0.8",)}, "argument 'b1' of adamw is set by --optim.b1"),
        ({"name": "adamsn", "arguments": ("subset_size=4",)}, r"subset_size = 4 does not divide the \[3\] of kernel"),
        ({"name": "sgd", "arguments": ("nesterov=true",)}, "nesterov = True has no effect without momentum"),
        ({"name": "sgd", "arguments": ("mask=true",)}, "argument 'mask' of sgd is unknown"),
        ({"name": "polyak_sgd"}, "'polyak_sgd' is not an optimizer"),
        ({"arguments": ("mu_dtype=bfloat17",)}, "'adamw' does not run with mu_dtype=bfloat17 .*: choose another"),
        (
            {"name": "sgd", "arguments": ("momentum=nan",)},
            "argument 'momentum=nan' of sgd is out of range: give a finite",
        ),
        (
            {"name": "sgd", "arguments": ("momentum=1e39",)},
            "argument 'momentum=1e39' of sgd is out of range: give a fin",
        ),
        (
            {"name": "rmsprop", "arguments": ("eps=-1",)},
            "argument 'eps=-1' of rmsprop is out of range: give at least 0",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(OptimConfig(warmup_steps=0, **fields), 10, PARAMS)


FROM_OPTAX = {
    "lion": (("b2=0.9",), lambda rate: optax.lion(rate, b2=0.9, weight_decay=0.0)),
    "adagrad": (("initial_accumulator_value=0.2",), lambda rate: optax.adagrad(rate, 0.2)),
    "rmsprop": (("decay=0.8", "centered=true"), lambda rate: optax.rmsprop(rate, 0.8, centered=True)),
    "nadamw": (
        ("b1=0.8", "mu_dtype=bfloat16"),
        lambda rate: optax.nadamw(rate, b1=0.8, mu_dtype="bfloat16", weight_decay=0.0),
    ),
    "adabelief": ((), optax.adabelief),
    "muon": (("beta=0.9", "ns_steps=3"), lambda rate: optax.contrib.muon(rate, beta=0.9, ns_steps=3)),
}
"""(arguments as given to the command, the same optimizer without decay of its own) by name."""


def test_an_optimizer_of_optax_is_clipped_scheduled_and_decays_once():
    params = {"kernel": jnp.linspace(-1, 2, 15).reshape(3, 5), "scale": jnp.linspace(1, 2, 5)}
    all_grads = [jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i), params) for i in range(2)]
    rates = jnp.array([0.1, 0.2])  # the first two of a warm-up to 0.3 at step 2

    def ours(name, arguments):
        fields = {"warmup_steps": 2, "learning_rate": 0.3, "weight_decay": 0.5, "clip_norm": 0.7}
        tx = build_optimizer(OptimConfig(name=name, arguments=arguments, **fields), 10)
        state, made = tx.init(params), []
        for grads in all_grads:
            updates, state = tx.update(grads, state, params)
            made.append(updates)
        return made

    def by_hand(make):
        tx = make(lambda count: rates[count])
        state, made = tx.init(params), []
        for rate, grads in zip(rates, all_grads, strict=True):
            norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
            updates, state = tx.update(jax.tree.map(lambda g, norm=norm: g * 0.7 / norm, grads), state, params)
            made.append({**updates, "kernel": updates["kernel"] - rate * 0.5 * params["kernel"]})
        return made

    @jax.jit
    def run():
        return {name: (ours(name, given), by_hand(make)) for name, (given, make) in FROM_OPTAX.items()}

    for name, (found, expected) in run().items():
        for t in range(2):
            for leaf in params:
                assert np.abs(expected[t][leaf]).max() > 1e-3, name
                assert_close(found[t][leaf], expected[t][leaf], FLOAT32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lion", "b2": 0.9}, "b2 = 0.9 is not read by lion: leave it out"),
        ({"name": "muon", "subset": "per_input"}, "subset = 'per_input' is not read by muon"),
        ({"name": "sgd", "eps": 1e-6}, "eps = 1e-06 is not read by sgd"),
        ({"name": "adafactor", "b1": 0.8}, "b1 = 0.8 is not read by adafactor"),
        ({"name": "adamw", "adam_lr_ratio": 0.2}, "adam_lr_ratio = 0.2 is not read by adamw"),
    ],
)
def test_a_field_that_the_optimizer_does_not_read_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**fields)


def test_arguments_are_json_or_words_of_python_or_texts():
    def momentum(*arguments):
        fields = {"name": "sgd", "arguments": ("momentum=0.5", *arguments), "weight_decay": 0.0, "clip_norm": None}
        tx = build_optimizer(OptimConfig(schedule="constant", warmup_steps=0, learning_rate=1.0, **fields), 10)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
        mu = optax.tree.get(state, "mu")
        return float(updates["scale"][0]), mu["scale"].dtype

    assert momentum() == momentum("nesterov=false") == momentum("nesterov=False") == (-1.0, jnp.float32)
    assert momentum("nesterov=true") == momentum("nesterov=True") == (-1.5, jnp.float32)
    assert momentum("mu_dtype=bfloat16") == (-1.0, jnp.bfloat16)
    assert momentum("mu_dtype=None") == momentum("mu_dtype=null") == (-1.0, jnp.float32)
