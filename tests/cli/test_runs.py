"""`jaxlm runs`: runs side by side, damaged ones named."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from support import command, refused

from jaxlm.config.base import to_dict
from jaxlm.config.presets import preset


def write_run(path, name="tiny", rows=(), checkpoints=None, **changes):
    """The files of a run that `jaxlm runs` reads."""
    config = preset(name)
    for part, fields in changes.items():
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"elapsed_s": 1.0, **row}) + "\n" for row in rows))
    for step, loss in (checkpoints or {}).items():
        folder = path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"step": step, "val_loss": loss, "sha256": {}}))


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three runs of one preset with settings of their own, in a working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    rows = [{"step": 10, "loss": 3.0}, {"step": 20, "val_loss": 2.5}, {"step": 40, "val_loss": 2.25}]
    few = {"steps": 60}
    write_run(tmp_path / "runs/tiny-10", rows=rows, checkpoints={40: 2.25}, train=few, optim={"learning_rate": 0.01})
    write_run(tmp_path / "runs/tiny-2", rows=rows[:2], train=few, optim={"name": "sgd"})
    write_run(tmp_path / "runs/tiny-1", train=few)
    (tmp_path / "runs/.tiny-3.partial").mkdir()
    (tmp_path / "runs/notes.txt").write_text("mine")
    return tmp_path


def test_runs_stand_in_the_order_of_their_numbers_with_what_differs(three):
    code, out, err = command("runs")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[:4] for row in rows] == [
        ["tiny-1", "tiny", "0/60", ""],
        ["tiny-2", "tiny", "20/60", "2.5000 at 20"],
        ["tiny-10", "tiny", "40/60", "2.2500 at 40"],
    ]
    assert [row[5] for row in rows] == ["", "optim.name sgd", "optim.learning_rate 0.01"]
    assert "all of them: train.steps 60\n" in out


def test_the_best_loss_is_an_exact_one_where_there_is_one(tmp_path):
    rows = [{"step": 10, "val_loss": 1, "eval_batches": 1}, {"step": 20, "val_loss": 2.5}, {"step": 30, "val_loss": 3}]
    write_run(tmp_path / "mixed", rows=rows)
    write_run(tmp_path / "estimates", rows=rows[:1])
    found = json.loads(command("runs", tmp_path, "--json")[1])["runs"]
    assert [(run["run"], run["val_loss"], run["val_step"]) for run in found] == [
        ("estimates", 1, 10),
        ("mixed", 2.5, 20),
    ]


def test_json_says_all_of_every_run(three):
    old = time.time() - 7200
    for file in ("config.json", "metrics.jsonl", "."):
        os.utime(three / "runs/tiny-10" / file, (old, old))
    found = json.loads(command("runs", "--json")[1])["runs"]
    assert [run["run"] for run in found] == ["tiny-1", "tiny-2", "tiny-10"]
    last = found[2]
    assert 7200 <= last.pop("age_s") < 7300
    assert last == {
        "run": "tiny-10",
        "preset": "tiny",
        "step": 40,
        "steps": 60,
        "val_loss": 2.25,
        "val_step": 40,
        "checkpoints": [40],
        "settings": {"optim.learning_rate": 0.01, "train.steps": 60},
    }
    assert "│ 2 h │" in command("runs")[1]


def test_a_run_may_be_named_itself_and_a_checkpoint_counts_without_rows(three):
    write_run(three / "imported", checkpoints={0: None, 5: 1.5})
    (run,) = json.loads(command("runs", "imported", "--json")[1])["runs"]
    assert (run["step"], run["val_loss"], run["checkpoints"]) == (5, 1.5, [0, 5])


def test_a_model_without_a_preset_shows_its_sizes(three):
    file = three / "runs/tiny-1/config.json"
    record = json.loads(file.read_text())
    record["config"]["preset"] = "imported"
    file.write_text(json.dumps(record))
    assert json.loads(command("runs", "--json")[1])["runs"][0]["settings"] == {"model": "L 2, D 32, N 2, T 32, V 65"}


def test_what_is_not_a_sound_run_is_named_in_one_line_each(three):
    (three / "runs/photos").mkdir()
    (three / "runs/tiny-1/config.json").write_text("{")
    (three / "runs/tiny-2/metrics.jsonl").write_text("nothing\n{}\n")
    (three / "runs/tiny-4").mkdir()
    (three / "runs/tiny-4/config.json").write_text('{"config": {"preset": "tiny", "depth": 3}}')
    write_run(three / "runs/tiny-5", checkpoints={3: 1.0})
    (three / "runs/tiny-5/checkpoints/3/manifest.json").write_text("[]")
    code, out, err = command("runs", "--json")
    assert code == 0
    assert [run["run"] for run in json.loads(out)["runs"]] == ["tiny-10"]
    warnings = err.splitlines()
    assert all(line.startswith("jaxlm: warning: ") for line in warnings)
    for line, words in zip(
        warnings,
        [
            "runs/photos is not a run: it has no config.json",
            "runs/tiny-1/config.json cannot be read as JSON",
            "runs/tiny-2/metrics.jsonl line 1",
            "runs/tiny-4/config.json is not a configuration of this version: ExperimentConfig has no field depth",
            "runs/tiny-5/checkpoints/3/manifest.json is damaged",
        ],
        strict=True,
    ):
        assert words in line


def test_no_runs_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs is not a folder: give one that holds runs" in refused("runs")
    (tmp_path / "runs").mkdir()
    assert command("runs") == (0, "runs holds no runs\n", "")
    assert command("runs", "--json") == (0, '{"runs": []}\n', "")


def test_the_run_that_training_wrote_is_listed(folder):
    run = next(run for run in json.loads(command("runs", "--json")[1])["runs"] if run["run"] == "tiny-1")
    assert (run["run"], run["step"], run["steps"], run["checkpoints"]) == ("tiny-1", 30, 30, [15, 30])
    assert run["val_loss"] > 0
    assert run["settings"]["model.num_layers"] == 1


def test_it_imports_no_jax(three):
    code = "import sys; from jaxlm.cli.main import main; main(['runs']); print('jax' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "False"
