"""Many steps in one compiled loop, and the Python loop around it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from jaxlm.config import ModelConfig, OptimConfig, TrainConfig
from jaxlm.data.batches import PaddedRows, TokenStream, WindowBlock
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.loop import Hook, loop, make_chunk, next_boundary
from jaxlm.training.step import init_state, train_step

CFG = ModelConfig(vocab_size=65, max_seq_len=7, num_layers=1, embed_dim=24, num_heads=3, mlp_dim=20, dropout=0.1)
TRAIN = TrainConfig(steps=30, batch_size=6, seed=3, log_every=5, eval_every=10, checkpoint_every=15)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2)
TX = build_optimizer(OPTIM, 30)
TOKENS = np.random.default_rng(0).integers(0, 65, 500).astype(np.uint8)
TEXT = TokenStream(jnp.asarray(TOKENS), CFG.max_seq_len)


def fresh(cfg=CFG, tx=TX):
    return init_state(init_params(build_model(cfg), jax.random.key(0)), tx)


@pytest.fixture(scope="module")
def chunk():
    return make_chunk(build_model(CFG), TX, TRAIN)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_however_a_run_is_cut_into_chunks_the_bits_are_the_same(chunk):
    whole, whole_metrics = chunk(fresh(), TEXT, 13)
    state = fresh()
    for stop in (1, 5, 6, 13):
        state, metrics = chunk(state, TEXT, stop)
        assert int(state.step) == stop == int(metrics.step)
    assert_same(state, whole)
    assert_same(metrics, whole_metrics)
    assert chunk._cache_size() == 1  # one program for every length


def test_a_mapped_file_trains_the_same_bits(chunk, tmp_path):
    TOKENS.tofile(tmp_path / "tokens")
    mapped = TokenStream(np.memmap(tmp_path / "tokens", TOKENS.dtype, mode="r"), CFG.max_seq_len)
    source = mapped.feed(TRAIN.seed, TRAIN.batch_size, TRAIN.log_every)
    expected, _ = chunk(fresh(), TEXT, 7)
    other = make_chunk(build_model(CFG), TX, TRAIN)
    state, _ = other(fresh(), source(0), 4)
    state, _ = other(state, source(4), 7)
    assert_same(state.params, expected.params)
    assert other._cache_size() == 1


def test_the_state_is_donated(chunk):
    state = fresh()
    chunk(state, TEXT, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_seeds_differ(chunk):
    other = make_chunk(build_model(CFG), TX, dataclasses.replace(TRAIN, seed=4))
    losses = [float(make(fresh(), TEXT, 1)[1].loss) for make in (chunk, other)]
    assert losses[0] != losses[1]


def test_a_chunk_weighs_no_padding():
    rows = np.random.default_rng(1).integers(0, 64, (40, 8)).astype(np.uint8)
    split = PaddedRows(np.where(np.arange(8) > 1 + np.arange(40)[:, None] % 7, np.uint8(64), rows), 64)
    source = split.feed(TRAIN.seed, TRAIN.batch_size, TRAIN.log_every)(0)
    state, metrics = make_chunk(build_model(CFG), TX, TRAIN)(fresh(), source, 2)
    step, expected = jax.jit(train_step, static_argnums=(2, 3, 4, 5)), fresh()
    for i in range(2):
        batch = source.windows(TRAIN.seed, i, TRAIN.batch_size)
        arguments = (batch, build_model(CFG), TX, TRAIN.seed, 1)
        unweighted = step(expected, *arguments)[1]
        expected, expected_metrics = step(expected, *arguments, source.weights(batch))
    assert_close(metrics.loss, expected_metrics.loss, FLOAT32)
    assert abs(float(unweighted.loss) - float(metrics.loss)) > 0.01
    assert int(state.step) == 2


def test_the_loop_stops_at_the_step_whose_loss_is_no_number(chunk):
    state = fresh()
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), state.params)
    state, metrics = chunk(state._replace(params=broken), TEXT, 9)
    assert int(state.step) == int(metrics.step) == 1
    assert not bool(metrics.sound)


def test_steps_without_a_finite_gradient_are_skipped_until_too_many_come_in_a_row(chunk):
    tx = build_optimizer(dataclasses.replace(OPTIM, max_nonfinite=2), 30)
    guarded = make_chunk(build_model(CFG), tx, TRAIN)
    sound = np.stack([TEXT.windows(TRAIN.seed, step, TRAIN.batch_size) for step in range(17)])
    spoiled = sound.copy()
    spoiled[[2, 5, 6, 10, 11, 13, 14, 15], 0, 0] = 999  # not in the vocabulary: its logits are NaN

    def train(state, stop, windows=spoiled):
        return guarded(state, WindowBlock(jnp.asarray(windows), jnp.int32(0)), stop)

    state, metrics = train(fresh(tx=tx), 9)
    assert (int(state.step), int(metrics.skipped), bool(metrics.is_skipped)) == (9, 3, False)
    expected, plain = fresh(tx=tx), fresh()
    for start, stop in (0, 2), (3, 5), (7, 9):
        expected, expected_metrics = train(expected._replace(step=jnp.int32(start)), stop, sound)
        plain, plain_metrics = chunk(plain._replace(step=jnp.int32(start)), TEXT, stop)
    inner_states = (s.opt_state.guarded.inner_state for s in (state, expected))
    assert_same(state.params, expected.params)
    assert_same(*inner_states)
    assert float(metrics.loss) == float(expected_metrics.loss)
    assert_close(metrics.loss, plain_metrics.loss, FLOAT32)  # another program
    assert (int(plain_metrics.skipped), bool(plain_metrics.is_skipped)) == (0, False)

    state, _ = train(state, 10)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = train(state, 12)
    assert_same(state.params, before)
    assert (bool(metrics.sound), bool(metrics.is_skipped), int(metrics.skipped)) == (True, True, 5)
    assert math.isnan(float(metrics.grad_norm))
    state, metrics = train(state, 17)
    assert (int(state.step), bool(metrics.sound), int(metrics.skipped)) == (16, False, 7)  # the third in a row
    assert guarded._cache_size() == 1


def test_boundaries_are_step_1_and_every_multiple():
    cfg = TrainConfig(steps=23, log_every=10, eval_every=8, checkpoint_every=15)
    steps = [0]
    while steps[-1] < 23:
        steps.append(next_boundary(steps[-1], cfg))
    assert steps == [0, 1, 8, 10, 15, 16, 20, 23]


class Recorder(Hook):
    def __init__(self, last=None):
        self.calls, self.last = [], last

    def should_stop(self):
        return self.last is not None and bool(self.calls) and self.calls[-1][1] >= self.last

    def on_chunk(self, metrics, steps, seconds):
        assert seconds > 0
        self.calls.append(("chunk", int(metrics.step), steps))

    def on_boundary(self, state, step):
        assert int(state.step) == step
        self.calls.append(("boundary", step))

    def on_end(self, state):
        self.calls.append(("end", int(state.step)))


def test_the_loop_tells_every_hook_of_every_step_once_and_in_order(chunk):
    first, second = Recorder(), Recorder()
    state = loop(chunk, fresh(), lambda step: TEXT, TRAIN, [first, Hook(), second])
    assert int(state.step) == 30
    chunks = [call for call in first.calls if call[0] == "chunk"]
    assert sum(call[2] for call in chunks) == 30
    assert {1, *range(5, 31, 5)} <= {call[1] for call in chunks}
    assert [call[1] for call in first.calls if call[0] == "boundary"] == [10, 15, 20, 30]
    assert [call[1] for call in first.calls] == sorted(call[1] for call in first.calls)
    assert [call for call in first.calls if call[0] == "end"] == [first.calls[-1]] == [("end", 30)]
    assert second.calls == first.calls


class Clock:
    """The time of a device that takes 20 ms a step."""

    def __init__(self):
        self.now = self.busy_until = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Late:
    """A loss that is there when the device is done."""

    def __init__(self, clock):
        self.clock, self.at = clock, clock.busy_until

    def is_ready(self):
        return self.clock.now >= self.at

    def __array__(self, *_, **__):
        self.clock.now = max(self.clock.now, self.at)
        return np.zeros(())


@pytest.mark.parametrize("held", ["never", "always", "later", "in turn"])
def test_a_chunk_is_said_to_take_as_long_as_its_own_steps(chunk, monkeypatch, held):
    """On a GPU a call lasts as long as its steps; on a CPU it returns at once, and the next chunk follows it."""
    clock, calls, told, waiting = Clock(), [], [], []
    monkeypatch.setattr("jaxlm.training.loop.time", clock)

    def slow(state, source, stop):
        steps, number = int(stop) - int(state.step), len(calls)
        state, metrics = chunk(state, source, stop)
        clock.sleep(1e-4)
        clock.busy_until = max(clock.now, clock.busy_until) + 0.02 * steps
        if {"never": False, "always": True, "later": number > 2, "in turn": number % 2}[held]:
            clock.now = clock.busy_until
        calls.append(stop)
        return state, metrics._replace(loss=Late(clock))

    class Timer(Hook):
        def on_chunk(self, metrics, steps, seconds):
            told.append((steps, seconds))
            waiting.append(len(calls) - len(told))
            clock.sleep(1e-3)

    loop(slow, fresh(), lambda step: TEXT, TRAIN, [Timer()])
    assert sum(steps for steps, _ in told) == 30
    np.testing.assert_allclose([seconds / steps for steps, seconds in told], 0.02, atol=2e-3)
    assert (max(waiting) == 1) == (held != "always")  # the next chunk is under way when one is told of


@pytest.mark.parametrize("place", [0, 1])
def test_any_hook_ends_the_loop(chunk, place):
    hooks = [Recorder(), Recorder()]
    hooks[place].last = 10
    state = loop(chunk, fresh(), lambda step: TEXT, TRAIN, hooks)
    assert 10 <= int(state.step) < 30
    assert hooks[place].calls[-1] == ("end", int(state.step))


def test_the_loop_asks_for_what_its_next_chunk_reads_and_takes_no_more_than_that(chunk, monkeypatch):
    monkeypatch.setattr("jaxlm.training.loop.CHUNK_STEPS", 3)
    asked, hook = [], Recorder()

    def source(step):
        asked.append(step)
        return TEXT

    loop(chunk, fresh(), source, TRAIN, [hook])
    lengths = np.diff([*asked, 30])
    assert asked[:2] == [0, 1]
    assert lengths.max() <= 3
    assert [call[2] for call in hook.calls if call[0] == "chunk"] == lengths.tolist()


def test_between_boundaries_nothing_waits_for_the_device_or_goes_there_unasked(chunk, tmp_path):
    """Reading the metrics of the last chunk is the one transfer, and is asked for."""
    TOKENS.tofile(tmp_path / "tokens")
    mapped = TokenStream(np.memmap(tmp_path / "tokens", TOKENS.dtype, mode="r"), CFG.max_seq_len)
    cfg, kinds = dataclasses.replace(TRAIN, eval_every=99, checkpoint_every=99), set()

    class Sound(Hook):
        def on_chunk(self, metrics, steps, seconds):
            kinds.update(map(type, metrics))
            assert bool(metrics.sound)

    for source in (lambda step: TEXT), mapped.feed(cfg.seed, cfg.batch_size, cfg.log_every):
        state = fresh()
        with jax.transfer_guard("disallow"):
            assert int(jax.device_get(loop(chunk, state, source, cfg, [Sound()]).step)) == 30
    assert not any(issubclass(kind, jax.Array) for kind in kinds)
