"""The memory of training: what its compiled programs take, that the state is written in place, what remat saves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlm.analysis.memory import compiled_memory, training_memory
from jaxlm.config.presets import preset
from jaxlm.training import loop


def small(**changes):
    """A preset whose activations outweigh its parameters."""
    config = preset("tiny")
    train = dataclasses.replace(config.train, batch_size=32)
    return dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, **changes))


@pytest.fixture(scope="module")
def memory():
    return training_memory(small(num_layers=3, scan_layers=True))


def test_the_peak_of_a_known_program_is_its_arguments_results_and_temporaries():
    x = jnp.ones((100, 10), jnp.float32)
    program = jax.jit(lambda x, y: (x + 1, y.sum()), donate_argnums=0).lower(x, x).compile()
    found = compiled_memory(program)
    assert (found.arguments, found.aliased) == (8000, 4000)
    assert found.peak == 8000 + found.outputs + found.temporaries - 4000
    assert 4000 < found.outputs < 4100


def test_what_must_live_is_counted_leaf_by_leaf(memory):
    config = small(num_layers=3, scan_layers=True)
    assert memory.parameters == memory.gradients
    assert memory.optimizer_state == pytest.approx(2 * memory.parameters, abs=100)  # two moments and counts
    assert memory.must_live == 4 * memory.parameters + memory.activations + (
        memory.optimizer_state - 2 * memory.parameters
    )
    tokens = config.train.batch_size * config.model.max_seq_len
    assert memory.activations > 3 * tokens * 4 * config.model.embed_dim * config.model.num_layers
    assert memory.step.arguments >= memory.parameters + memory.optimizer_state
    assert memory.evaluation.temporaries < memory.step.temporaries
    assert memory.evaluation.arguments > memory.parameters


def test_the_state_is_written_in_place(memory, monkeypatch):
    state = memory.parameters + memory.optimizer_state + 4  # and the step
    assert memory.step.aliased == state
    jit = functools.partial(jax.jit, donate_argnums=())
    monkeypatch.setattr(loop.jax, "jit", lambda *arguments, donate_argnums=(), **named: jit(*arguments, **named))
    undonated = training_memory(small(num_layers=3, scan_layers=True)).step
    assert undonated.aliased == 0
    assert undonated.peak >= memory.step.peak + state


def test_remat_saves_most_of_the_activations_of_scanned_layers(memory):
    saved = training_memory(small(num_layers=3, scan_layers=True, remat=True))
    assert saved.activations < memory.activations / 3
    assert saved.step.peak < 0.6 * memory.step.peak
    assert saved.parameters == memory.parameters
