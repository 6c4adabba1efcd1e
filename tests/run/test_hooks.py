"""What happens beside the steps of a run, hook by hook."""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import pytest

from jaxlm.config import ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.errors import CheckError
from jaxlm.optim import build_schedule
from jaxlm.run import checkpoint, hooks
from jaxlm.run.manifest import Loss, verify
from jaxlm.run.progress import Progress
from jaxlm.run.saving import Saver
from jaxlm.training.step import StepMetrics, TrainState

CFG = TrainConfig(steps=20, log_every=5, eval_every=8, checkpoint_every=6, keep=9)
CONFIG = ExperimentConfig(
    preset="test", model=ModelConfig(vocab_size=5, max_seq_len=7), optim=OptimConfig(warmup_steps=4), train=CFG
)


def measured(step, loss=2.0, grad_norm=1.0, skipped=0, is_skipped=False):
    values = jnp.int32(step), jnp.float32(loss), jnp.float32(grad_norm), jnp.int32(skipped), jnp.bool_(is_skipped)
    return StepMetrics(*values)


def state(step):
    return TrainState({"w": jnp.float32([step])}, (), jnp.int32(step))


class NotingProgress(Progress):
    """Notes what it is told."""

    def __init__(self):
        super().__init__(CFG, 0)
        self.calls, self.chunks = [], []
        self.clock.add_chunk = lambda steps, seconds: self.chunks.append((steps, seconds))

    def move(self, step):
        self.calls.append(("move", step))

    def say(self, text):
        self.calls.append(("say", text))

    def evaluating(self, step, share=0.0):
        self.calls.append(("evaluating", step, share))


def test_a_signal_or_the_time_limit_stops():
    received = []
    hook = hooks.StopOnRequest(CFG, received)
    assert not hook.should_stop()
    received.append(15)
    assert hook.should_stop()
    assert hooks.StopOnRequest(dataclasses.replace(CFG, max_minutes=0.0), []).should_stop()
    hook = hooks.StopOnRequest(dataclasses.replace(CFG, max_minutes=0.001), [])
    assert not hook.should_stop()
    time.sleep(0.07)
    assert hook.should_stop()


def test_progress_moves_with_every_chunk_and_says_what_is_skipped_once():
    progress = NotingProgress()
    hook = hooks.ShowProgress(progress, skipped=2)
    for step, skipped in ((5, 2), (6, 3), (7, 3), (9, 5)):
        hook.on_chunk(measured(step, skipped=skipped), 1, 0.5)
    assert [call for call in progress.calls if call[0] == "say"] == [
        ("say", "step 6: 1 step skipped, gradient not finite"),
        ("say", "step 9: 2 steps skipped, gradient not finite"),
    ]
    assert [call[1] for call in progress.calls if call[0] == "move"] == [5, 6, 7, 9]
    assert progress.chunks == [(1, 0.5)] * 4


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"grad_norm": math.inf}])
def test_divergence_ends_the_run_unless_the_step_was_skipped(tmp_path, bad):
    hook = hooks.CheckDivergence(tmp_path)
    hook.on_chunk(measured(5), 1, 0.5)
    hook.on_chunk(measured(5, **bad, is_skipped=True), 1, 0.5)
    words = r"step 5: loss .*, gradient norm .*; .* keeps its last checkpoint \({}\); lower --optim.learning-rate"
    with pytest.raises(CheckError, match=words.format("none")):
        hook.on_chunk(measured(5, **bad), 1, 0.5)
    checkpoint.save(tmp_path / "checkpoints", state(3), None, keep=1)
    with pytest.raises(CheckError, match=words.format("step 3")):
        hook.on_chunk(measured(5, **bad), 1, 0.5)


def test_rows_are_written_for_step_1_the_last_and_every_log_every():
    rows = []
    hook = hooks.WriteMetrics(CONFIG, 84.0, rows.append, lambda seconds: {"gflops_per_s": 3.0 / seconds})
    for step in range(1, 21):
        hook.on_chunk(measured(step, loss=step), 1, 0.5)
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    schedule = build_schedule(CONFIG.optim, 20)
    speed = {"tokens_per_s": 168.0, "gflops_per_s": 6.0}  # half a second a step
    assert rows[1] == {"step": 5, "loss": 5.0, "lr": float(schedule(4)), "grad_norm": 1.0, **speed}


def test_the_rate_leaves_out_skipped_steps_and_the_row_of_one_has_no_loss():
    rows = []
    hook = hooks.WriteMetrics(CONFIG, 84.0, rows.append)
    hook.on_chunk(measured(5, skipped=2), 5, 0.5)
    hook.on_chunk(measured(10, loss=math.nan, skipped=3, is_skipped=True), 5, 0.25)
    assert rows[0]["lr"] == float(build_schedule(CONFIG.optim, 20)(2))
    assert rows[0]["skipped"] == 2
    assert rows[1] == {"step": 10, "tokens_per_s": 1680.0, "skipped": 3}


def saving(folder, saved_step=None, best=None, **changes):
    cfg = dataclasses.replace(CFG, **changes)
    return hooks.SaveCheckpoints(Saver(folder, cfg.keep), cfg, saved_step, best)


def evaluating(losses, progress, rows, save, received=(), **changes):
    def evaluation(params, report):
        report(1, 2)
        report(2, 2)
        loss = losses[int(params["w"][0])]
        estimate = {"eval_batches": loss.eval_batches} if isinstance(loss, Loss) else {}
        return {"val_loss": loss[0] if estimate else loss, "perplexity": 1.0, **estimate}

    cfg = dataclasses.replace(CFG, **changes)
    return hooks.Evaluate(evaluation, cfg, progress, rows.append, save, list(received))


def test_evaluations_come_in_their_rhythm_and_show_their_progress(tmp_path):
    progress, rows = NotingProgress(), []
    hook = evaluating({8: 3.0, 16: 2.0, 20: 1.0}, progress, rows, saving(tmp_path))
    assert hook.val_loss is None
    for step in (6, 8, 12, 16, 18, 20):
        hook.on_boundary(state(step), step)
    assert rows == [{"step": s, "val_loss": loss, "perplexity": 1.0} for s, loss in ((8, 3.0), (16, 2.0), (20, 1.0))]
    assert progress.calls[:2] == [("evaluating", 8, 0.0), ("evaluating", 8, 0.5)]
    assert len(progress.calls) == 6
    assert progress.clock.eval_seconds > 0
    assert hook.val_loss == 1.0
    assert not hook.is_owed


def manifest(folder, step):
    return json.loads((folder / str(step) / "manifest.json").read_text())


def test_checkpoints_come_in_their_rhythm_with_the_loss_of_their_own_step(tmp_path):
    save = saving(tmp_path)
    evaluate = evaluating({8: 3.0, 16: 2.0, 20: 1.0}, NotingProgress(), [], save)
    for step in (6, 8, 12, 16, 18, 20):
        for hook in (save, evaluate):
            hook.on_boundary(state(step), step)
    save.on_end(state(20))
    assert {6, 12, 18, 20} <= {*checkpoint.steps(tmp_path)}
    losses = {step: manifest(tmp_path, step)["val_loss"] for step in (6, 8, 12, 18, 20)}
    assert losses == {6: None, 8: 3.0, 12: None, 18: None, 20: 1.0}
    for step in losses:
        verify(tmp_path / str(step))
    assert not [*tmp_path.glob(".*")]


def test_the_first_evaluation_is_of_a_state_that_is_saved(tmp_path):
    """It may end the run, for lack of memory."""
    seen = []

    def evaluation(params, report):
        seen.append(checkpoint.steps(tmp_path))
        raise MemoryError

    hook = hooks.Evaluate(evaluation, CFG, NotingProgress(), [].append, saving(tmp_path), [])
    with pytest.raises(MemoryError):
        hook.on_boundary(state(8), 8)
    assert seen == [[8]]


def test_checkpoints_that_the_best_loss_no_longer_keeps_are_removed(tmp_path):
    save = saving(tmp_path, keep=1, checkpoint_every=1)
    evaluate = evaluating({8: 3.0, 16: 2.0, 20: 2.5}, NotingProgress(), [], save)
    for step, kept in ((8, [8]), (9, [8, 9]), (16, [16]), (20, [16, 20])):
        for hook in (save, evaluate):
            hook.on_boundary(state(step), step)
        save.on_end(state(step))  # waits for a save in the background
        assert checkpoint.steps(tmp_path) == kept


@pytest.mark.parametrize("when", ["before", "in"])
def test_a_signal_ends_an_evaluation_which_is_owed(tmp_path, when):
    received, rows, save = [], [], saving(tmp_path)

    def evaluation(params, report):
        assert when == "in"
        received.append(2)
        report(1, 2)
        raise AssertionError("went on")

    hook = hooks.Evaluate(evaluation, CFG, NotingProgress(), rows.append, save, received)
    received += [2] * (when == "before")
    hook.on_boundary(state(8), 8)
    assert (hook.is_owed, hook.val_loss, rows) == (True, None, [])
    assert checkpoint.steps(tmp_path) == [8]
    # The next session does what is owed, once.
    hook = evaluating({8: 3.0}, NotingProgress(), rows, saving(tmp_path, saved_step=8))
    hook.catch_up(state(8), 8, [{"step": 8, "loss": 1.0}])
    assert [row["step"] for row in rows] == [8]
    assert manifest(tmp_path, 8)["val_loss"] == 3.0
    hook.catch_up(state(8), 8, rows)
    assert len(rows) == 1


def test_a_session_catches_up_with_what_a_kill_has_cut_off(tmp_path):
    checkpoint.save(tmp_path, state(8), None, keep=9)
    hook = evaluating({}, NotingProgress(), [], saving(tmp_path, saved_step=8))
    hook.catch_up(state(8), 8, [{"step": 8, "val_loss": 2.5}])  # a kill came before the manifest
    assert manifest(tmp_path, 8)["val_loss"] == 2.5
    for step in (0, 6):  # nothing is due
        hook.catch_up(state(step), step, [])
    assert hook.val_loss is None


@pytest.mark.parametrize(("losses", "kept"), [({8: 3.0, 16: 3.5}, [8, 12, 18]), ({8: 3.0, 16: 2.0}, [16, 18])])
def test_the_best_evaluation_is_saved_where_no_save_is_due(tmp_path, losses, kept):
    save = saving(tmp_path, keep=2)
    evaluate = evaluating(losses, NotingProgress(), [], save)
    for step in (6, 8, 12, 16, 18):
        for hook in (save, evaluate):
            hook.on_boundary(state(step), step)
    save.on_end(state(18))
    assert checkpoint.steps(tmp_path) == kept
    assert checkpoint.best_step(tmp_path) == min(losses, key=losses.get)


def test_a_resumed_session_saves_only_what_is_better_than_the_best_of_the_ones_before(tmp_path):
    save = saving(tmp_path, saved_step=8, best=Loss(2.5), keep=9)
    evaluate = evaluating({8: 3.0, 16: 2.6, 20: 2.0}, NotingProgress(), [], save, eval_every=4)
    evaluate.val_loss = 3.0  # not the first of the session, which is saved before it is evaluated
    for step in (16, 20):
        evaluate.on_boundary(state(step), step)
    assert checkpoint.steps(tmp_path) == [20]


def test_the_first_exact_evaluation_is_better_than_every_estimate(tmp_path):
    checkpoint.save(tmp_path, state(8), None, keep=9)
    estimates = evaluating({}, NotingProgress(), [], saving(tmp_path, saved_step=8))
    estimates.catch_up(state(8), 8, [{"step": 8, "val_loss": 2.0, "eval_batches": 1}])
    assert checkpoint.best_loss(tmp_path) == Loss(2.0, 1)
    save = saving(tmp_path, saved_step=8, best=checkpoint.best_loss(tmp_path), keep=9)
    evaluate = evaluating({16: 2.6, 20: Loss(1.0, 1)}, NotingProgress(), [], save, eval_every=4)
    evaluate.val_loss = 2.0  # not the first of the session, which is saved before it is evaluated
    for step in (16, 20):
        evaluate.on_boundary(state(step), step)
    assert checkpoint.steps(tmp_path) == [8, 16]
    assert checkpoint.best_loss(tmp_path) == Loss(2.6)


def test_a_state_is_saved_where_training_ends_unless_it_is_already(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, state, *rest: saved.append(int(state.step)))
    saving(tmp_path, saved_step=12).on_end(state(12))
    assert saved == []
    saving(tmp_path, saved_step=12).on_end(state(13))
    saving(tmp_path, saved_step=None).on_end(state(0))
    assert saved == [13, 0]


def test_hooks_on_chunks_use_nothing_of_the_device(tmp_path):
    """What they computed there would wait for the chunk under way. Rates are computed ahead, in the first row."""
    rows = []
    write = hooks.WriteMetrics(CONFIG, 84.0, rows.append)
    metrics = {step: jax.device_get(measured(step)) for step in (5, 10)}
    in_order = hooks.ShowProgress(NotingProgress(), 0), hooks.CheckDivergence(tmp_path), write
    write.on_chunk(jax.device_get(measured(1)), 1, 0.5)
    with jax.transfer_guard("disallow"):
        for step in (5, 10):
            for hook in in_order:
                hook.on_chunk(metrics[step], 4, 0.5)
    schedule = build_schedule(CONFIG.optim, 20)
    assert [row["lr"] for row in rows] == [float(schedule(step - 1)) for step in (1, 5, 10)]
