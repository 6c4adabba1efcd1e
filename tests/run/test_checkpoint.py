import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_tokens

from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.errors import CheckError
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.run import checkpoint, manifest
from jaxlm.run.manifest import Loss
from jaxlm.training.step import init_state, train_step

CFG = ModelConfig(vocab_size=11, max_seq_len=7, num_layers=1, embed_dim=12, num_heads=3, mlp_dim=0, dropout=0.1)
TX = build_optimizer(OptimConfig(warmup_steps=2), 30)
STEP = jax.jit(train_step, static_argnums=(2, 3, 4, 5))


def trained(steps, seed=0, cfg=CFG):
    state = init_state(init_params(build_model(cfg), jax.random.key(seed)), TX)
    for i in range(steps):
        state, _ = STEP(state, random_tokens(cfg, 3, 8, seed=i), build_model(cfg), TX, 0, 1)
    return state


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 1, 2 and 3."""
    for steps in (1, 2, 3):
        checkpoint.save(tmp_path, trained(steps), None, keep=3)
    return tmp_path


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_restored_state_takes_the_same_next_step(tmp_path):
    state = trained(3)
    checkpoint.save(tmp_path, state, Loss(1.5), keep=2)
    restored, damaged = checkpoint.restore_latest(tmp_path, trained(0, seed=9))
    assert damaged == []
    assert_same(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    windows = random_tokens(CFG, 3, 8, seed=5)
    assert_same(*(STEP(s, windows, build_model(CFG), TX, 0, 1) for s in (restored, state)))


def test_parameters_alone(folder):
    like = jax.eval_shape(lambda: trained(0).params)
    assert_same(checkpoint.restore_params(folder / "2", like), trained(2).params)


def test_bfloat16_parameters_come_back_exactly(tmp_path):
    state = trained(1)
    half = state._replace(params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.params))
    checkpoint.save(tmp_path, half, None, 1)
    assert_same(checkpoint.restore_params(tmp_path / "1", half.params), half.params)


def test_the_latest_and_the_best_are_kept(tmp_path):
    for steps, val_loss in enumerate([3.0, 1.0, 2.0, None, 2.5]):
        checkpoint.save(tmp_path, trained(steps), None if val_loss is None else Loss(val_loss), keep=2)
    assert checkpoint.steps(tmp_path) == [1, 3, 4]
    assert checkpoint.best_step(tmp_path) == 1


def test_exact_losses_come_before_estimates_and_estimates_from_more_batches_before_those_from_fewer(tmp_path):
    of_kinds = [Loss(1.0, 1), Loss(2.0, 4), Loss(1.9, 4), Loss(0.5, 1), Loss(3.0), Loss(1.0, 8), Loss(2.9), Loss(3.1)]
    bests = []
    for steps, loss in enumerate(of_kinds):
        checkpoint.save(tmp_path, trained(steps), loss, keep=1)
        bests.append(checkpoint.best_step(tmp_path))
        assert checkpoint.best_loss(tmp_path) == of_kinds[bests[-1]]
        assert checkpoint.steps(tmp_path) == sorted({bests[-1], steps})
    assert bests == [0, 1, 2, 2, 4, 4, 6, 6]
    # An older version did not say what kind its losses are of.
    entries = {"step": 7, "val_loss": 2.5, "sha256": manifest.read(tmp_path / "7")["sha256"]}
    (tmp_path / "7" / "manifest.json").write_text(json.dumps(entries))
    assert checkpoint.best_loss(tmp_path) == Loss(2.5)


def test_saving_after_damage_loses_neither_the_new_checkpoint_nor_the_sound_one(tmp_path):
    for steps, val_loss in ((1, 2.5), (4, 2.0)):
        checkpoint.save(tmp_path, trained(steps), None if val_loss is None else Loss(val_loss), keep=2)
    flip_a_bit(tmp_path / "4")
    state, damaged = checkpoint.restore_latest(tmp_path, trained(0))
    assert (int(state.step), len(damaged)) == (1, 1)
    checkpoint.save(tmp_path, trained(2), None, keep=1)
    assert checkpoint.steps(tmp_path) == [1, 2]  # the best sound one and the new one
    assert (tmp_path / ".4.damaged").is_dir()


@pytest.mark.parametrize(
    "content", ["null", "[]", '{"sha256": {}, "val_loss": "x"}', '{"sha256": {}, "eval_batches": "x"}', ""]
)
def test_an_unreadable_manifest_counts_for_nothing(folder, content):
    (folder / "3" / "manifest.json").write_text(content)
    assert not checkpoint.readable(folder / "3")
    assert checkpoint.best_step(folder) is None
    assert int(checkpoint.restore_latest(folder, trained(0))[0].step) == 2


def largest_file(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_a_bit(path):
    file = largest_file(path / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(path, **changes):
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(content | changes))


DAMAGE = {
    "a flipped bit": (flip_a_bit, "has changed"),
    "a missing file": (lambda path: largest_file(path / "opt_state").unlink(), "is missing"),
    "a surplus file": (lambda path: (path / "params" / "stray").write_text("x"), "stray is not in the manifest"),
    "a truncated manifest": (lambda path: (path / "manifest.json").write_text('{"step": 3'), "manifest.json"),
    "another loss": (lambda path: edit(path, val_loss=0.5), "manifest.json cannot be read or has changed"),
    "the manifest of another": (
        lambda path: shutil.copy(path.parent / "2" / "manifest.json", path),
        "its manifest.json is that of step 2",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "a link that leads nowhere": (lambda path: (path / "params" / "x").symlink_to("nowhere"), "params/x is a link"),
    "a lost part": (lambda path: shutil.rmtree(path / "params"), "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_restored(folder, kind):
    damage, words = DAMAGE[kind]
    damage(folder / "3")
    with pytest.raises(CheckError, match="is damaged"):
        manifest.verify(folder / "3")
    state, damaged = checkpoint.restore_latest(folder, trained(0))
    assert int(state.step) == 2
    assert_same(state, trained(2))
    assert len(damaged) == 1
    assert words in damaged[0]
    assert str(folder / "3") in damaged[0]


def test_a_damaged_checkpoint_takes_the_place_of_an_earlier_one_of_its_step(folder):
    for _ in range(2):
        checkpoint.save(folder, trained(4), None, keep=9)
        flip_a_bit(folder / "4")
        assert int(checkpoint.restore_latest(folder, trained(0))[0].step) == 3
    assert [path.name for path in folder.glob(".*")] == [".4.damaged"]


def test_a_step_is_saved_over_what_stands_in_its_place(folder):
    (folder / "3" / "params" / "stray").write_text("x")
    (folder / "5").mkdir()
    for step in (3, 5):
        checkpoint.save(folder, trained(step), None, keep=9)
        manifest.verify(folder / str(step))
    assert list(folder.glob(".*")) == []


def test_leftovers_of_a_killed_save_are_no_checkpoints(folder):
    (folder / "9").mkdir()
    (folder / ".7.partial" / "params").mkdir(parents=True)
    assert checkpoint.steps(folder) == [1, 2, 3]
    state, damaged = checkpoint.restore_latest(folder, trained(0))
    assert (int(state.step), damaged) == (3, [])


def test_when_all_are_damaged_each_is_named(folder):
    for step in "123":
        flip_a_bit(folder / step)
    with pytest.raises(CheckError) as error:
        checkpoint.restore_latest(folder, trained(0))
    assert str(error.value).count("is damaged") == 3


def test_nothing_saved_yet(tmp_path):
    assert checkpoint.restore_latest(tmp_path, trained(0)) is None


def test_another_shape_is_named_with_both(folder):
    cfg = ModelConfig(vocab_size=11, max_seq_len=7, num_layers=1, embed_dim=15, num_heads=3, mlp_dim=0)
    like = jax.eval_shape(lambda: init_params(build_model(cfg), jax.random.key(0)))
    with pytest.raises(ValueError, match="block_0/attention/key/bias is .*12.* there, .*15.* here"):
        checkpoint.restore_params(folder / "3", like)


def test_a_manifest_lists_every_file(folder):
    listed = json.loads((folder / "3" / "manifest.json").read_text())
    files = {str(f.relative_to(folder / "3")) for f in (folder / "3").rglob("*") if f.is_file()}
    assert set(listed["sha256"]) == files
    assert listed["step"] == 3
