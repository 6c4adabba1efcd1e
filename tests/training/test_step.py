"""The training step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import built, random_tokens
from tolerances import FLOAT32, assert_close

from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.data.batches import target_weights
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.step import batch_loss, init_state, train_step

CFG = ModelConfig(vocab_size=65, max_seq_len=7, num_layers=1, embed_dim=24, num_heads=3, mlp_dim=20, dropout=0.1)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2)
TX = build_optimizer(OPTIM, 30)


def fresh(cfg=CFG, tx=TX):
    return init_state(init_params(build_model(cfg), jax.random.key(0)), tx)


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


def test_micro_batches_of_bfloat16_gradients_are_added_in_float32():
    """256 equal micro-batches: in bfloat16 the sum would stop growing, and the mean be about half of the gradient."""
    cfg = dataclasses.replace(CFG, dropout=0.0, param_dtype="bfloat16", dtype="bfloat16")
    windows = jnp.tile(random_tokens(cfg, 1, 8), (256, 1))
    step = jax.jit(train_step, static_argnums=(2, 3, 4, 5))
    tx = optax.sgd(1.0)
    one, _ = step(fresh(cfg, tx), windows[:1], build_model(cfg), tx, 0, 1)
    many, _ = step(fresh(cfg, tx), windows, build_model(cfg), tx, 0, 256)
    jax.tree.map(lambda a, b: assert_close(a, b, 0.02), many.params, one.params)


def padded_rows(lengths, width=8):
    """Rows of random tokens and then 64, the padding of these tests; row i has lengths[i] targets."""
    rows = np.random.default_rng(1).integers(0, 64, (len(lengths), width))
    return jnp.asarray(np.where(np.arange(width) > np.array(lengths)[:, None], 64, rows), jnp.int32)


def test_padding_has_no_weight_however_the_batch_is_cut():
    cfg = dataclasses.replace(CFG, dropout=0.0, qkv_bias=False)
    lengths = 7, 7, 1, 2, 1, 3  # micro-batches of 14, 3 and 4 targets
    rows, model = padded_rows(lengths), build_model(cfg)
    step, weights = jax.jit(train_step, static_argnums=(2, 3, 4, 5)), target_weights(rows, 64)
    (whole, whole_metrics), (parts, parts_metrics) = (step(fresh(cfg), rows, model, TX, 0, n, weights) for n in (1, 3))

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


@pytest.mark.parametrize("name", ["prodigy", "dog", "dowg", "cocob", "madgrad"])
def test_optimizers_that_keep_the_first_parameters_can_give_their_state_away(name):
    """A loop that donates its state gives each array away once, so no two may be one."""
    params = {"w": jnp.ones((3, 5)), "b": jnp.zeros(5)}
    state = init_state(params, build_optimizer(OptimConfig(name=name, warmup_steps=0), 10, params))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len({*places}) == len(places) > 6
    jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 2, s), donate_argnums=0)(state)
