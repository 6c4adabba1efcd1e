"""`jaxlm reproduce`: a quick version from the command line, side by side, reports, refusals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import command, refused

from jaxlm.errors import UserError
from jaxlm.reproduce.catalog import experiment
from jaxlm.reproduce.side_by_side import perform_all


@pytest.fixture(scope="module")
def done(tmp_path_factory, shakespeare):
    """The folder of a quick version, two trainings side by side, and what the command printed."""
    out = tmp_path_factory.mktemp("out")
    code, printed, err = command(
        "reproduce", "cmu15780", "--quick", "--row", "sgd-0.1", "adam-1e-3", "--processes", "2", "--out", out, "--json"
    )
    assert code == 0, err
    return out / "quick", json.loads(printed), err


def test_a_quick_version_writes_its_report(done):
    out, printed, err = done
    lines = {line["row"]: line for line in printed["table"] if line["quantity"] == "val_loss"}
    assert lines["adam-1e-3"]["verdict"] == "quick version"
    assert 2 < lines["adam-1e-3"]["ours"] < 5
    assert lines["sgd-1e-3"]["verdict"] == "not run"
    assert (out / "results/cmu15780.csv").read_text().count("adam-1e-3") == 2  # the row and its command
    assert f"done: adam-1e-3, seed 0: val_loss {lines['adam-1e-3']['by_seed'][0]:.4f}\n" in err


def test_both_processes_used_a_core_each(done):
    files = [done[0] / f"cmu15780/{name}-seed-0/record.json" for name in ("sgd-0.1", "adam-1e-3")]
    assert [json.loads(file.read_text())["threads"] for file in files] == [1, 1]


def test_a_second_call_trains_nothing(done):
    before = (done[0] / "cmu15780/sgd-0.1-seed-0/metrics.jsonl").stat().st_mtime_ns
    code, out, _ = command("reproduce", "cmu15780", "--quick", "--row", "sgd-0.1", "--out", done[0].parent)
    assert code == 0
    assert "SGD 0.1" in out
    assert (done[0] / "cmu15780/sgd-0.1-seed-0/metrics.jsonl").stat().st_mtime_ns == before


def test_own_prompts_are_continued_side_by_side(done, tmp_path):
    arguments = ["reproduce", "cmu15780", "--quick", "--only-report", "--prompt", "JULIET:", "--out", done[0].parent]
    code, out, _ = command(*arguments)
    assert code == 0
    assert "JULIET:" in out
    code, out, _ = command(*arguments, "--json")
    assert json.loads(out)["samples"]["Adam 1e-3"].startswith("JULIET:")
    code, _, err = command(*arguments[:-1], tmp_path)
    assert code == 2
    assert "holds no finished training" in err


def test_quick_versions_of_small_models_share_a_process(tmp_path, shakespeare, monkeypatch):
    monkeypatch.setattr("jaxlm.reproduce.side_by_side.perform_all", lambda *_: pytest.fail("started processes"))
    monkeypatch.setattr("jaxlm.reproduce.records.usable_cores", lambda: 2)
    code, _, err = command("reproduce", "nanogpt-optimizers", "--quick", "--row", "sgd-0.1", "--out", tmp_path)
    assert code == 0, err
    assert "done: sgd-0.1, seed 0: val_loss" in err


def test_a_process_that_fails_is_named(done, tmp_path):
    exp = experiment("cmu15780")
    (tmp_path / "sgd-0.1-seed-0").mkdir()
    (tmp_path / "sgd-0.1-seed-0/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"row sgd-0.1, seed 0 ended with exit code 2: .*config.json is not"):
        perform_all(exp, [(exp.row("sgd-0.1"), 0)], tmp_path, True, 2, lambda job: None)


@pytest.mark.slow
def test_a_signal_stops_all_processes_and_the_next_call_goes_on(tmp_path, shakespeare):
    arguments = ["reproduce", "cmu15780", "--row", "sgd-0.1", "--seeds", "0", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm", *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    logs = [tmp_path / f"cmu15780/sgd-0.1-seed-{seed}/metrics.jsonl" for seed in (0, 1)]
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, err
    assert "the same command goes on" in err
    for log in logs:
        assert list((log.parent / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanogpt-optimizers", "stats305", "cmu10423", "cmu15780", "nanogpt-gpu", "cmu11785"])
def test_every_experiment_has_a_quick_version(name, tmp_path, shakespeare, request):
    if name == "cmu11785":
        request.getfixturevalue("librispeech")
    code, out, err = command("reproduce", name, "--quick", "--out", tmp_path, "--json")
    assert code == 0, err
    assert {line["verdict"] for line in json.loads(out)["table"]} == {"quick version"}
    assert (tmp_path / f"quick/results/{name}.png").stat().st_size > 10_000


def test_bad_input_is_refused_in_one_line(tmp_path):
    assert "experiment 'cs305' is unknown" in refused("reproduce", "cs305")
    assert "row 'gpt' is unknown in stats305" in refused("reproduce", "stats305", "--row", "gpt", "--out", tmp_path)
    assert "seed = -1 is out of range" in refused("reproduce", "stats305", "--seeds", "-1")
    assert "processes = 0 is too small" in refused("reproduce", "stats305", "--processes", "0")
    assert "row 'nope' is unknown" in refused("reproduce", "stats305", "--only-report", "--row", "nope")
    (tmp_path / "file").write_text("")
    assert "is a file: give a folder" in refused("reproduce", "stats305", "--out", tmp_path / "file")
    (tmp_path / "file").unlink()
    assert "leave one out" in refused("reproduce", "stats305", "--quick", "--report", tmp_path)
    assert list(tmp_path.iterdir()) == []
