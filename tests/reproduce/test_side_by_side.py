"""What several rows at once say of their progress."""

import json
import subprocess
import sys

import pytest

from jaxlm.config.presets import preset
from jaxlm.reproduce import side_by_side
from jaxlm.reproduce.records import folder_of
from jaxlm.reproduce.rows import Experiment, Training
from jaxlm.reproduce.work import StoppedError

ROW = Training(name="small", label="small", config=preset("tiny"))


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A row whose metrics are read at every look, and what adds rows to them."""
    monkeypatch.setattr(side_by_side, "LOOK_S", 0.0)
    folder_of(tmp_path, "small", 3).mkdir()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    def write(*rows):
        with (folder_of(tmp_path, "small", 3) / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({"elapsed_s": 1.0, **row}) + "\n" for row in rows)

    return side_by_side._Running((ROW, 3), process, tmp_path), write


def said(running, capsys):
    running.report()
    return capsys.readouterr().err


def test_each_evaluation_is_said_once(running, capsys):
    row, write = running
    steps = ROW.config.train.steps
    assert said(row, capsys) == ""
    write({"step": 1, "loss": 4.0}, {"step": 40, "val_loss": 2.114}, {"step": 50, "loss": 2.0})
    assert said(row, capsys) == f"small, seed 3: step 40/{steps}, val 2.11\n"
    assert said(row, capsys) == ""
    write({"step": 80, "val_loss": 1.9})
    assert said(row, capsys) == f"small, seed 3: step 80/{steps}, val 1.90\n"


def test_a_row_is_not_silent_for_long(running, capsys, monkeypatch):
    row, write = running
    monkeypatch.setattr(side_by_side, "SILENCE_S", 0.0)
    assert said(row, capsys) == f"small, seed 3: step 0/{ROW.config.train.steps}\n"
    write({"step": 40, "val_loss": 2.114}, {"step": 50, "loss": 2.0})
    assert said(row, capsys).endswith("step 40/200, val 2.11\n".replace("200", str(ROW.config.train.steps)))
    assert said(row, capsys).endswith(f"step 50/{ROW.config.train.steps}, loss 2.00\n")


def test_metrics_are_not_read_at_every_turn(running, capsys, monkeypatch):
    row, write = running
    monkeypatch.setattr(side_by_side, "LOOK_S", 1000.0)
    assert said(row, capsys) == ""
    write({"step": 40, "val_loss": 2.0})
    assert said(row, capsys) == ""


def test_rows_side_by_side_say_where_they_are(tmp_path, capsys, monkeypatch):
    """The process is a stand-in that writes an evaluation and waits."""
    monkeypatch.setattr(side_by_side, "LOOK_S", 0.0)
    exp = Experiment(name="mine", title="mine", rows=(ROW,), side_by_side=True, draw=lambda records: None)
    folder = folder_of(tmp_path, "small", 0)
    script = (
        f"import pathlib, time; folder = pathlib.Path({str(folder)!r}); folder.mkdir(); "
        '(folder / \'metrics.jsonl\').write_text(\'{"step": 40, "val_loss": 2.114, "elapsed_s": 1.0}\\n\'); '
        "time.sleep(2); raise SystemExit(143)"
    )
    monkeypatch.setattr(
        side_by_side, "_start", lambda *_: subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    )
    with pytest.raises(StoppedError):
        side_by_side.perform_all(exp, [(ROW, 0)], tmp_path, False, 1, lambda job: None)
    assert capsys.readouterr().err == f"small, seed 0: step 40/{ROW.config.train.steps}, val 2.11\n"
