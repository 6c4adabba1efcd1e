"""The step, the compiled loop around it, and evaluation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import apply, built, random_tokens
from tolerances import FLOAT32, assert_close

from jaxlm.config import ModelConfig, OptimConfig, TrainConfig
from jaxlm.data.batches import batch_starts, eval_batches, host_windows
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.evaluate import make_evaluate
from jaxlm.training.loop import loop, make_chunk, next_boundary
from jaxlm.training.step import batch_loss, init_state, train_step

CFG = ModelConfig(vocab_size=65, max_seq_len=7, num_layers=1, embed_dim=24, num_heads=3, mlp_dim=20, dropout=0.1)
TRAIN = TrainConfig(steps=30, batch_size=6, seed=3, log_every=5, eval_every=10, checkpoint_every=15)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2)
TX = build_optimizer(OPTIM, 30)
TEXT = jnp.asarray(np.random.default_rng(0).integers(0, 65, 500).astype(np.uint8))


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


def test_windows_given_from_outside_train_the_same_bits(chunk):
    expected, _ = chunk(fresh(), TEXT, 4)
    windows = host_windows(np.asarray(TEXT), TRAIN.seed, 0, TRAIN.log_every, TRAIN.batch_size, CFG.max_seq_len)
    given = make_chunk(build_model(CFG), TX, TRAIN)
    state, _ = given(fresh(), jnp.asarray(windows), 4)
    assert_same(state.params, expected.params)


def test_the_state_is_donated(chunk):
    state = fresh()
    chunk(state, TEXT, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_seeds_differ(chunk):
    other = make_chunk(build_model(CFG), TX, dataclasses.replace(TRAIN, seed=4))
    losses = [float(make(fresh(), TEXT, 1)[1].loss) for make in (chunk, other)]
    assert losses[0] != losses[1]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    cfg = dataclasses.replace(CFG, dropout=0.0, qkv_bias=False)  # a key bias has no gradient but noise
    windows = random_tokens(cfg, 6, 8)
    step = jax.jit(train_step, static_argnums=(2, 3, 4, 5))
    whole, whole_metrics = step(fresh(cfg), windows, build_model(cfg), TX, 0, 1)
    parts, parts_metrics = step(fresh(cfg), windows, build_model(cfg), TX, 0, 3)
    assert_close(parts_metrics.loss, whole_metrics.loss, FLOAT32)
    assert_close(parts_metrics.grad_norm, whole_metrics.grad_norm, FLOAT32)
    moments = [state.opt_state[1][0].mu for state in (parts, whole)]
    jax.tree.map(lambda a, b: assert_close(a, b, 10 * FLOAT32), *moments)


def padded_rows(lengths, width=8):
    """Rows of random tokens and then 64, the padding of these tests; row i has lengths[i] targets."""
    rows = np.random.default_rng(1).integers(0, 64, (len(lengths), width))
    return jnp.asarray(np.where(np.arange(width) > np.array(lengths)[:, None], 64, rows), jnp.int32)


def test_padding_has_no_weight_however_the_batch_is_cut():
    cfg = dataclasses.replace(CFG, dropout=0.0, qkv_bias=False)
    lengths = 7, 7, 1, 2, 1, 3  # micro-batches of 14, 3 and 4 targets
    rows, model = padded_rows(lengths), build_model(cfg)
    step = jax.jit(train_step, static_argnums=(2, 3, 4, 5, 6))
    (whole, whole_metrics), (parts, parts_metrics) = (step(fresh(cfg), rows, model, TX, 0, n, 64) for n in (1, 3))

    def mean_loss(params):
        logits, _ = model.apply({"params": params}, rows[:, :-1])
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)[..., 0]
        return sum(losses[i, :n].sum() for i, n in enumerate(lengths)) / sum(lengths)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(fresh(cfg).params)
    clip = min(1, 1 / float(optax.tree.norm(grads)))  # the default clip_norm; the first moment is (1 - b1) g
    expected = jax.tree.map(lambda g: 0.1 * clip * g, grads)
    for state, metrics in ((whole, whole_metrics), (parts, parts_metrics)):
        assert_close(metrics.loss, loss, FLOAT32)
        assert_close(metrics.grad_norm, optax.tree.norm(grads), FLOAT32)
        jax.tree.map(lambda a, b: assert_close(a, b, 10 * FLOAT32), state.opt_state[1][0].mu, expected)


def test_a_chunk_takes_its_rows_by_the_sequence_of_its_seed():
    rows = padded_rows([1 + i % 7 for i in range(40)]).astype(jnp.uint8)
    state, metrics = make_chunk(build_model(CFG), TX, TRAIN, 64)(fresh(), rows, 2)
    step, expected = jax.jit(train_step, static_argnums=(2, 3, 4, 5, 6)), fresh()
    for i in range(2):
        batch = rows[batch_starts(TRAIN.seed, i, TRAIN.batch_size, 40)].astype(jnp.int32)
        expected, expected_metrics = step(expected, batch, build_model(CFG), TX, TRAIN.seed, 1, 64)
    assert_close(metrics.loss, expected_metrics.loss, FLOAT32)
    assert int(state.step) == 2


def test_dropout_is_on_in_training_and_changes_with_the_step():
    windows = random_tokens(CFG, 6, 8)
    step = jax.jit(train_step, static_argnums=(2, 3, 4, 5))
    state = fresh()
    later = state._replace(step=jnp.int32(1))
    off = dataclasses.replace(CFG, dropout=0.0)
    losses = [
        float(step(s, windows, build_model(cfg), TX, 0, 1)[1].loss)
        for s, cfg in ((state, CFG), (later, CFG), (state, off))
    ]
    assert len(set(losses)) == 3


def test_micro_batches_draw_dropout_of_their_own():
    cfg = dataclasses.replace(CFG, dropout=0.5)
    twice = jnp.tile(random_tokens(cfg, 3, 8), (2, 1))
    step = jax.jit(train_step, static_argnums=(2, 3, 4, 5))
    norms = []
    for windows, accumulate in ((twice, 2), (twice[:3], 1)):
        norms.append(float(step(fresh(cfg), windows, build_model(cfg), TX, 0, accumulate)[1].loss))
    assert norms[0] != pytest.approx(norms[1], rel=1e-4)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)
    halves = [batch_loss(fresh(cfg).params, build_model(cfg), twice[:3], jax.random.fold_in(key, i)) for i in (0, 1)]
    assert float(halves[0]) != float(halves[1])
    assert norms[0] == pytest.approx(float(sum(halves)) / 2, rel=1e-5)


def test_one_batch_can_be_learned_by_heart():
    cfg = dataclasses.replace(CFG, dropout=0.0)
    tx = build_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0), 400)
    step = jax.jit(train_step, static_argnums=(2, 3, 4, 5))
    state, windows, model = fresh(cfg, tx), random_tokens(cfg, 3, 8), build_model(cfg)
    state, first = step(state, windows, model, tx, 0, 1)
    for _ in range(300):
        state, metrics = step(state, windows, model, tx, 0, 1)
    assert float(first.loss) == pytest.approx(math.log(65), abs=0.3)
    assert float(metrics.loss) < 0.05


def test_golden_step():
    """If this fails after a deliberate change of the model, loss, optimizer or batches: check the new numbers against
    the printed ones' meaning, then replace them; CHANGELOG tells users that runs no longer repeat bitwise."""
    cfg = ModelConfig(
        vocab_size=11, max_seq_len=5, num_layers=2, embed_dim=12, num_heads=2, num_kv_heads=1, position="rope", window=3
    )
    tx = build_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=0), 10)
    _, params = built(cfg)
    windows = random_tokens(cfg, 3, 6)
    state, metrics = jax.jit(train_step, static_argnums=(2, 3, 4, 5))(
        init_state(params, tx), windows, build_model(cfg), tx, 0, 1
    )
    checksum = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(state.params))
    found = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), "checksum": checksum}
    golden = {"loss": 2.9965706, "grad_norm": 3.4254105, "checksum": 921.03133}
    assert found == pytest.approx(golden, rel=1e-4), f"now {found}"


def test_the_loop_stops_at_the_step_whose_loss_is_no_number(chunk):
    state = fresh()
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), state.params)
    state, metrics = chunk(state._replace(params=broken), TEXT, 9)
    assert int(state.step) == int(metrics.step) == 1
    assert not bool(metrics.sound)


def test_steps_without_a_finite_gradient_are_skipped_until_too_many_come_in_a_row(chunk):
    tx = build_optimizer(dataclasses.replace(OPTIM, max_nonfinite=2), 30)
    guarded = make_chunk(build_model(CFG), tx, TRAIN)
    sound = host_windows(np.asarray(TEXT), TRAIN.seed, 0, 17, TRAIN.batch_size, CFG.max_seq_len).astype(np.int32)
    spoiled = sound.copy()
    spoiled[[2, 5, 6, 10, 11, 13, 14, 15], 0, 0] = 999  # no id of the vocabulary: its logits are no numbers

    def train(state, stop, windows=spoiled):
        return guarded(state, jnp.asarray(np.roll(windows, -int(state.step), axis=0)), stop)

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
    found = [0]
    while found[-1] < 23:
        found.append(next_boundary(found[-1], cfg))
    assert found == [0, 1, 8, 10, 15, 16, 20, 23]


class Hooks:
    def __init__(self, last=None):
        self.calls, self.last = [], last

    def stop(self):
        return self.last is not None and bool(self.calls) and self.calls[-1][1] >= self.last

    def report(self, metrics, steps, seconds):
        assert seconds > 0
        self.calls.append(("report", int(metrics.step), steps))

    def boundary(self, state, step):
        assert int(state.step) == step
        self.calls.append(("boundary", step))


def test_the_loop_reports_every_step_once_and_in_order(chunk):
    hooks = Hooks()
    state = loop(chunk, fresh(), lambda first, stop: TEXT, TRAIN, hooks)
    assert int(state.step) == 30
    reported = [call for call in hooks.calls if call[0] == "report"]
    assert sum(call[2] for call in reported) == 30
    assert {1, *range(5, 31, 5)} <= {call[1] for call in reported}
    assert [call[1] for call in hooks.calls if call[0] == "boundary"] == [10, 15, 20, 30]
    assert [call[1] for call in hooks.calls] == sorted(call[1] for call in hooks.calls)


def test_the_loop_ends_early_when_asked(chunk):
    hooks = Hooks(last=10)
    state = loop(chunk, fresh(), lambda first, stop: TEXT, TRAIN, hooks)
    assert 10 <= int(state.step) < 30
    assert hooks.calls[-1][1] == int(state.step)


def test_evaluation_is_the_mean_over_every_target():
    cfg = dataclasses.replace(CFG, dropout=0.0)
    model, params = built(cfg)
    tokens = np.asarray(TEXT)[:38]
    found = make_evaluate(model)(params, eval_batches(tokens, 7, 2, groups=2))
    losses = []
    for start in range(0, 37, 7):
        window = tokens[start : start + 8].astype(np.int32)
        logits = np.asarray(apply(model, params, jnp.asarray(window[None, :-1]))[0][0], np.float64)
        losses += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(window) - 1), window[1:]])
    assert len(losses) == 37
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
