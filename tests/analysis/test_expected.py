"""What a training step is expected to take: memory beside the compiler's own number, FLOPs, and what is refused."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.analysis import expected
from jaxlm.analysis.accelerators import ACCELERATORS
from jaxlm.analysis.costs import forward_flops_per_token
from jaxlm.analysis.expected import StepCost, check_compiled, check_memory, is_close, speed_fields, step_cost
from jaxlm.analysis.memory import training_memory
from jaxlm.config.presets import preset
from jaxlm.data.batches import PaddedRows, TokenStream
from jaxlm.errors import UserError
from jaxlm.training.step import TrainState

TINY = preset("tiny")


def tiny(**changes):
    return dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, **changes))


def free(monkeypatch, size):
    monkeypatch.setattr(expected, "free_memory", lambda: size)


def test_the_estimate_is_near_what_the_compiler_asks_for():
    config = tiny(num_layers=1)
    ratio = step_cost(config, {}).memory / training_memory(config).step.peak
    assert 0.9 < ratio < 1.4


@pytest.mark.parametrize("changes", [{}, {"window": (8, None)}, {"family": "bigram"}])
def test_flops_are_three_times_those_of_the_forward_pass(changes):
    model = {"family": "bigram"} if "family" in changes else dataclasses.asdict(TINY.model) | changes
    if "family" in changes:
        model |= {"vocab_size": 65, "max_seq_len": 32}
    config = dataclasses.replace(TINY, model=type(TINY.model)(**model))
    assert step_cost(config, {}).flops == 3 * 8 * 32 * forward_flops_per_token(config.model)


def test_deep_models_are_counted_from_two_of_their_layers(monkeypatch):
    config = tiny(num_layers=5)
    extrapolated = step_cost(config, {})
    whole = expected._trace(config.model, 8)
    assert extrapolated.flops == 3 * whole.flops
    assert extrapolated.activations == pytest.approx(whole.kept + 8 * 32 * 65 * 4, rel=1e-3)
    remat = step_cost(tiny(num_layers=5, remat=True), {})
    assert remat.flops == extrapolated.flops
    assert remat.activations < 0.5 * extrapolated.activations


def test_accumulation_takes_a_part_of_the_activations_and_totals_of_the_gradients():
    train = dataclasses.replace(TINY.train, grad_accum=4)
    whole, parts = step_cost(TINY, {}), step_cost(dataclasses.replace(TINY, train=train), {})
    assert parts.activations == pytest.approx(whole.activations / 4, rel=0.1)
    assert parts.state == whole.state + 4 * 27_840
    assert parts.flops == whole.flops


def test_the_windows_of_the_whole_batch_count_whatever_is_accumulated(monkeypatch, tmp_path):
    train = dataclasses.replace(TINY.train, batch_size=200_000, grad_accum=25_000, log_every=5)
    config = dataclasses.replace(tiny(num_layers=1), train=train)
    cost = step_cost(config, {})
    assert cost.batch == 200_000 * 33 * 4
    assert cost.memory == pytest.approx(training_memory(config).step.peak, rel=0.05)
    assert step_cost(config, {"data": 2, "fsdp": 2, "tensor": 1}).batch == cost.batch / 4
    rows = PaddedRows(np.zeros((3, 33), np.uint8), 1)
    assert step_cost(config, {}, rows).batch == cost.batch + 200_000 * 32 * 4
    (tmp_path / "tokens").write_bytes(bytes(100))
    mapped = TokenStream(np.memmap(tmp_path / "tokens", np.uint16, "r"), 32)
    assert step_cost(config, {}, mapped).batch == cost.batch + 2 * 5 * 200_000 * 33 * 2
    free(monkeypatch, 17 * 10**6)
    with pytest.raises(
        UserError, match=r"grad_accum = 25000\): the batch alone takes 26.4 MB, so give a smaller --train.b"
    ):
        check_memory(cost, train)
    whole = dataclasses.replace(train, grad_accum=1)
    free(monkeypatch, 27_300_000)
    with pytest.raises(UserError, match=r"or --train.grad-accum 50000, which computes it in parts"):
        check_memory(step_cost(dataclasses.replace(config, train=whole), {}), whole)


def test_a_mesh_splits_the_state_and_the_batch_but_computes_the_same():
    whole, split = step_cost(TINY, {}), step_cost(TINY, {"data": 2, "fsdp": 2, "tensor": 2})
    assert (split.flops, split.rows) == (whole.flops, 2)
    assert split.state < 0.5 * whole.state
    assert split.activations < 0.4 * whole.activations
    with pytest.raises(UserError, match="does not divide the 8 rows"):
        step_cost(TINY, {"data": 3, "fsdp": 1, "tensor": 1})


def test_a_step_that_cannot_fit_is_refused_with_what_would_fit(monkeypatch):
    cost = StepCost(state=10**9, activations=64 * 10**9, batch=0, rows=64, flops=1.0)
    train = dataclasses.replace(TINY.train, batch_size=64)
    free(monkeypatch, 8 * 10**9)
    with pytest.raises(UserError) as refusal:
        check_memory(cost, train)
    assert re.fullmatch(
        r"a training step needs about 65.0 GB and cpu has 8.0 GB free \(batch_size = 64, grad_accum = 1\): give a "
        r"smaller --train.batch-size, or --train.grad-accum 16, which computes it in parts",
        str(refusal.value),
    )
    free(monkeypatch, 10**9 // 2)
    with pytest.raises(UserError, match="optimizer alone take 1.0 GB, so give a smaller model"):
        check_memory(cost, train)
    free(monkeypatch, 3 * 10**9 // 2)
    with pytest.raises(UserError, match="not even one row fits"):
        check_memory(cost, train)
    for size in (None, 50 * 10**9):  # nobody says; an estimate that may be too high
        free(monkeypatch, size)
        check_memory(cost, train)
    assert is_close(cost)
    free(monkeypatch, 80 * 10**9)
    assert not is_close(cost)


def test_close_to_the_limit_the_compiled_program_decides(monkeypatch):
    program = jax.jit(lambda state, source, stop: jnp.sort(state.params["w"] + stop).cumsum())
    state, source = TrainState({"w": jnp.ones(10_000)}, (), jnp.int32(0)), TokenStream(jnp.arange(9), 4)
    free(monkeypatch, 10**6)
    check_compiled(program, state, source, 3)
    free(monkeypatch, 1)
    with pytest.raises(MemoryError, match=r"\d+ bytes of which 1 are free"):
        check_compiled(program, state, source, 3)


def test_speed_is_a_share_of_a_known_peak_or_in_gflops(monkeypatch):
    assert speed_fields(TINY, 3e9, 2)(0.5) == {"gflops_per_s": 6.0}
    assert speed_fields(TINY, 0.0, 1)(0.5) == {}
    h100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(expected.jax, "devices", lambda: [h100])
    bfloat16 = tiny(dtype="bfloat16")
    assert speed_fields(bfloat16, 989.4e12, 2)(1.0) == {"mfu": 0.5}
    assert speed_fields(tiny(dtype="float64"), 3e9, 1)(0.5) == {"gflops_per_s": 6.0}  # no data sheet has one


def test_every_accelerator_has_its_own_kinds():
    kinds = [kind for found in ACCELERATORS.values() for kind in found.kinds]
    assert len(kinds) == len({*kinds})
    assert all(found.kinds for found in ACCELERATORS.values())
