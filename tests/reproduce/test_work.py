"""Doing rows: once, resumed, from another row's weights; quick versions."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.reproduce import work
from jaxlm.reproduce.catalog import EXPERIMENTS, experiment
from jaxlm.reproduce.records import folder_of, locked, read_record
from jaxlm.reproduce.rows import Experiment, Measurement, Training
from jaxlm.run.metrics import read_rows


def experiment_of(*rows):
    return Experiment(name="mine", title="mine", rows=rows, side_by_side=False, draw=lambda records: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory, shakespeare):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(shakespeare.read_text()[:20_000])
    tiny = preset("tiny")
    train = dataclasses.replace(tiny.train, steps=6, eval_every=3, checkpoint_every=3, log_every=2)
    model = dataclasses.replace(tiny.model, num_layers=1, position="rope")
    optim = dataclasses.replace(tiny.optim, warmup_steps=2)
    return dataclasses.replace(tiny, data=DataConfig(path=str(path)), train=train, model=model, optim=optim)


@pytest.fixture(scope="module")
def first(tmp_path_factory, config):
    """The root of a trained row, and that row."""
    root = tmp_path_factory.mktemp("root")
    row = Training(
        name="first", label="first", config=config, prompts=("\n",), measure=lambda run, _: {"layers": run.step}
    )
    work.perform(experiment_of(row), row, 1, root, quick=False)
    return root, row


def test_a_record_holds_what_the_run_gave(first):
    root, row = first
    record = read_record(experiment_of(row), root, row, 1, False)
    rows = read_rows(folder_of(root, "first", 1) / "metrics.jsonl")
    evaluations = [entry for entry in rows if "val_loss" in entry]
    assert record["val_loss"] == evaluations[-1]["val_loss"]
    assert [point[0] for point in record["curve"]] == [3, 6]
    assert record["curve"][0][1:] == [evaluations[0]["train_loss"], evaluations[0]["val_loss"]]
    assert record["last_loss"] == [entry["loss"] for entry in rows if "loss" in entry][-1]
    assert record["perplexity"] == pytest.approx(np.exp(record["val_loss"]))
    assert record["state_bytes"] == 2 * 4 * record["parameters"] + 8  # two moments in float32 and two counters
    assert record["samples"]["\n"].startswith("\n")
    assert record["layers"] == 6
    assert record["wall_s"] >= 0
    assert record["settings"]["train.seed"] == 1


def test_what_is_done_is_not_done_again(first, monkeypatch):
    root, row = first
    monkeypatch.setattr(work, "_train", lambda *_: pytest.fail("trained again"))
    work.perform(experiment_of(row), row, 1, root, quick=False)


def test_a_quantity_that_a_record_lacks_is_measured_without_training_again(first, tmp_path):
    root, row = first
    shutil.copytree(folder_of(root, "first", 1), folder_of(tmp_path, "first", 1))
    wider = dataclasses.replace(row, shown=("width",), measure=lambda run, _: {"width": run.config.model.embed_dim})
    before = (folder_of(tmp_path, "first", 1) / "metrics.jsonl").read_text()
    work.perform(experiment_of(wider), wider, 1, tmp_path, quick=False)
    assert read_record(experiment_of(wider), tmp_path, wider, 1, False)["width"] == 32
    assert (folder_of(tmp_path, "first", 1) / "metrics.jsonl").read_text() == before


def test_a_stopped_training_goes_on(first, config, tmp_path):
    root, row = first
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3, seed=1))
    from jaxlm.run.training import train

    long = dataclasses.replace(stopped, train=dataclasses.replace(stopped.train, steps=6, max_minutes=0.0))
    train(long, folder_of(tmp_path, "first", 1), keep_warmup=True)
    before = read_rows(folder_of(tmp_path, "first", 1) / "metrics.jsonl")
    assert len(before) < len(read_rows(folder_of(root, "first", 1) / "metrics.jsonl"))
    work.perform(experiment_of(row), row, 1, tmp_path, quick=False)
    assert (
        read_record(experiment_of(row), tmp_path, row, 1, False)["val_loss"]
        == read_record(experiment_of(row), root, row, 1, False)["val_loss"]
    )


def test_other_settings_in_the_same_folder_are_refused(first):
    root, row = first
    optim = dataclasses.replace(row.config.optim, learning_rate=0.5)
    changed = dataclasses.replace(row, config=dataclasses.replace(row.config, optim=optim))
    with pytest.raises(UserError, match="learning_rate"):
        work.perform(experiment_of(changed), changed, 1, root, quick=False)


def test_a_row_begins_with_the_weights_of_another(first, config):
    root, first_row = first
    model = dataclasses.replace(config.model, max_seq_len=64)
    frozen = dataclasses.replace(config.optim, learning_rate=0.0)
    row = Training(
        name="second", label="second", init_from="first", config=dataclasses.replace(config, model=model, optim=frozen)
    )
    work.perform(experiment_of(first_row, row), row, 1, root, quick=False)
    record = read_record(experiment_of(first_row, row), root, row, 1, False)
    assert [point[0] for point in record["curve"]] == [0, 3, 6]
    assert record["start_loss"] == record["val_loss"]  # at a rate of 0
    source = json.loads((folder_of(root, "second", 1) / "config.json").read_text())["init_from"]
    assert source["run"] == str(folder_of(root, "first", 1).absolute())


def test_a_measurement_is_kept(tmp_path):
    row = Measurement(
        name="counted", label="counted", measure=lambda quick: {"quick": quick, "markdown": []}, measured={}
    )
    work.perform(experiment_of(row), row, 0, tmp_path, quick=True)
    assert read_record(experiment_of(row), tmp_path, row, 0, True)["quick"] is True


def test_only_quick_versions_are_compiled_without_optimization(config, tmp_path, monkeypatch):
    row, name, seen = Training(name="small", label="small", config=config), "jax_disable_most_optimizations", []
    before = jax.config.values[name]

    def train(*_):
        seen.append(jax.config.values[name])
        raise UserError("seen")

    monkeypatch.setattr(work, "_train", train)
    for quick in (True, False):
        with pytest.raises(UserError, match="seen"):
            work.perform(experiment_of(row), row, 0, tmp_path, quick)
    assert (seen, jax.config.values[name]) == ([True, before], before)
    assert not before


def test_two_processes_do_not_do_the_same_row(tmp_path):
    row = Measurement(name="counted", label="counted", measure=lambda quick: pytest.fail("done twice"), measured={})
    with locked(tmp_path, "counted", 0), pytest.raises(UserError, match="another process is at .*counted-seed-0: wait"):
        work.perform(experiment_of(row), row, 0, tmp_path, quick=True)


def test_what_needs_an_accelerator_says_so_on_a_cpu(config, tmp_path):
    row = Training(name="large", label="large", config=config, accelerator=True)
    with pytest.raises(UserError, match="row large needs an accelerator"):
        work.perform(experiment_of(row), row, 0, tmp_path, quick=False)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "cmu11785"])
def test_every_training_has_a_quick_version(name, tmp_path, shakespeare):
    for row in experiment(name).rows:
        if isinstance(row, Training):
            quick = work.quick_config(row.seeded(0), tmp_path)
            assert quick.train.steps == 6
            assert quick.model.num_layers <= 4
    assert (tmp_path / "quick-data/text.txt").read_text() == shakespeare.read_text()[: work.QUICK_TEXT]


def test_the_quick_version_of_transcripts_reads_a_few(tmp_path, librispeech):
    quick = work.quick_config(experiment("cmu11785").row("transcripts").seeded(0), tmp_path)
    lines = (tmp_path / "quick-data/val.csv").read_text().splitlines()
    assert len(lines) == work.QUICK_ROWS + 1
    assert quick.data.val_path == str(tmp_path / "quick-data/val.csv")
