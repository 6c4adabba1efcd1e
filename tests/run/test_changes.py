"""What may change when a run is resumed, and what is kept of it."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest

from jaxlm.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.errors import UserError
from jaxlm.optim import build_schedule
from jaxlm.run import changes
from jaxlm.run.folder import read_config
from jaxlm.run.training import train

MODEL = ModelConfig(family="embedding_bigram", vocab_size=58, max_seq_len=32, embed_dim=8)


def changed(config, **parts):
    """The config with other values of some fields: optim={"learning_rate": 1.0}."""
    new = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **new)


@pytest.fixture
def config(tmp_path, shakespeare):
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:30_000])
    return ExperimentConfig(
        preset="test",
        model=MODEL,
        data=DataConfig(path=str(tmp_path / "text.txt")),
        optim=OptimConfig(warmup_steps=0, weight_decay=0.0, learning_rate=0.01),
        train=TrainConfig(steps=20, batch_size=4, log_every=5, eval_every=20, checkpoint_every=10),
    )


def logged(out, name):
    return {
        row["step"]: row[name]
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if name in row
    }


def test_the_optimizer_may_change_where_its_state_fits(config):
    config = changed(config, optim={"weight_decay": 0.1})
    for optim in {"learning_rate": 1.0}, {"b2": 0.5}, {"weight_decay": 0.2}, {"clip_norm": None}, {"schedule": "rsqrt"}:
        new = changed(config, optim=optim)
        changes.check_same(new, config, Path("out"))
        ((field, value),) = optim.items()
        (change,) = changes.changes(new, config, 7)
        assert change == {"step": 7, "field": f"optim.{field}", "from": getattr(config.optim, field), "to": value}
    free = changed(config, train={"keep": 9, "log_every": 1}, sample={"seed": 3}, mesh={"data": 2})
    changes.check_same(free, config, Path("out"))
    assert changes.changes(free, config, 7) == []
    for parts in (
        {"optim": {"name": "sgd"}},
        {"optim": {"max_nonfinite": 3}},
        {"optim": {"weight_decay": 0.0}},
        {"train": {"seed": 1}},
    ):
        ((part, fields),) = parts.items()
        with pytest.raises(UserError, match=f"out was trained with {part}.{next(iter(fields))} = .*: drop that change"):
            changes.check_same(changed(config, **parts), config, Path("out"))


def test_a_diverged_run_goes_on_with_another_rate_which_is_told_and_kept(config, tmp_path):
    out = tmp_path / "run"
    half = changed(config, train={"max_minutes": 0.0})
    train(half, out)
    slower = changed(config, optim={"learning_rate": 0.001})
    with pytest.warns(UserWarning, match=r"from step 0 on, optim.learning_rate = 0.001 instead of 0.01; config.json"):
        train(slower, out, resume=True)
    assert logged(out, "lr")[1] == float(build_schedule(slower.optim, 20)(0))
    kept = [{"step": 0, "field": "optim.learning_rate", "from": 0.01, "to": 0.001}]
    assert json.loads((out / "config.json").read_text())["changes"] == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(read_config(out), out, resume=True)
    assert json.loads((out / "config.json").read_text())["changes"] == kept


def test_a_longer_run_tells_of_the_jump_in_the_rate_or_keeps_the_schedule(config, tmp_path):
    train(config, tmp_path / "run")
    longer = changed(config, train={"steps": 40})
    for out in tmp_path / "jumps", tmp_path / "keeps":
        shutil.copytree(tmp_path / "run", out)
    words = r"steps = 40 instead of 20: cosine ends later, .* of step 21 is 0.0055 instead of 0.001; --optim.keep-sch"
    with pytest.warns(UserWarning, match=words):
        train(longer, tmp_path / "jumps", resume=True)
    assert logged(tmp_path / "jumps", "lr")[25] == float(build_schedule(config.optim, 40)(24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(longer, tmp_path / "keeps", resume=True, keep_schedule=True)
    rates = logged(tmp_path / "keeps", "lr")
    assert [rates[step] for step in (25, 40)] == pytest.approx([0.001] * 2)
    assert rates[15] == float(build_schedule(config.optim, 20)(14))
    stored = read_config(tmp_path / "keeps")
    assert (stored.train.steps, stored.optim.schedule_steps) == (40, 20)
    again = changed(stored, train={"steps": 41})
    assert changes.with_schedule_of(again, stored).optim.schedule_steps == 20


def test_a_schedule_is_kept_only_where_there_is_one(config, tmp_path):
    with pytest.raises(UserError, match=r"--optim.keep-schedule is for a run that goes on: add --resume"):
        train(config, tmp_path / "run", keep_schedule=True)
    constant = changed(config, optim={"schedule": "constant"})
    with pytest.raises(UserError, match="for a schedule with an end, and constant has none"):
        changes.with_schedule_of(constant, constant)
    with pytest.raises(UserError, match="schedule_steps = 9 is not read by schedule = 'constant'"):
        OptimConfig(schedule="constant", schedule_steps=9)


def test_changes_that_do_not_move_the_rate_are_not_told(config):
    constant = changed(config, optim={"schedule": "constant"})
    longer = changed(constant, train={"steps": 40})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changes.tell(changes.changes(longer, constant, 20), longer, constant)


def told(config, stored, step, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        changes.tell(changes.changes(config, stored, step), config, stored, **options)
    return [str(warning.message) for warning in caught]


def test_every_jump_of_the_rate_is_told_and_a_schedule_that_ends_early(config):
    decayed = changed(config, optim={"weight_decay": 0.1})
    jump = "the learning rate of step 21 is 0.0055 instead of 0.001"
    beside = told(changed(decayed, train={"steps": 40}, optim={"weight_decay": 0.2}), decayed, 20)
    assert beside[0].startswith("from step 20 on, optim.weight_decay = 0.2 instead of 0.1")
    assert f"cosine ends later, so {jump}; --optim.keep-schedule" in beside[1]
    kept = changed(config, train={"steps": 40}, optim={"schedule_steps": 20})
    freed = told(changed(kept, optim={"schedule_steps": None}), kept, 20)
    assert freed == ["from step 20 on, optim.schedule_steps = None instead of 20; config.json keeps that", jump]
    (still,) = told(changed(kept, train={"steps": 60}), kept, 20)
    assert still.startswith(
        "the schedule ends at step 20 as before (optim.schedule_steps): --optim.schedule-steps None"
    )
    assert told(kept, config, 20, keep_schedule=True) == []
    (asked,) = told(changed(config, train={"steps": 40}, optim={"learning_rate": 0.002}), config, 20)
    assert asked.startswith("from step 20 on, optim.learning_rate = 0.002")


def test_a_warm_up_of_ones_own_is_taken_though_it_is_the_preset_s(config, tmp_path):
    preset = changed(config, optim={"warmup_steps": 4}, train={"max_minutes": 0.0, "steps": 40})
    preset = dataclasses.replace(preset, preset="tiny")
    train(preset, tmp_path / "run", keep_warmup=True)
    usual = changed(preset, optim={"warmup_steps": 20})
    for keep_warmup, warmup in (False, 4), (True, 20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(usual, tmp_path / "run", resume=True, keep_warmup=keep_warmup)
        assert read_config(tmp_path / "run").optim.warmup_steps == warmup


def test_fewer_epochs_than_are_taken_are_refused_and_change_nothing(config, tmp_path):
    train(config, tmp_path / "run")
    stored = (tmp_path / "run/config.json").read_bytes()
    fewer = changed(read_config(tmp_path / "run"), train={"epochs": 1e-6})
    with pytest.raises(UserError, match="already has 20 steps, more than steps = 1: give more steps or epochs"):
        train(fewer, tmp_path / "run", resume=True)
    assert (tmp_path / "run/config.json").read_bytes() == stored
