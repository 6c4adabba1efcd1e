"""One process at a time trains a run, and begins by sweeping. Other processes are real ones."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest

from jaxlm.errors import UserError
from jaxlm.run import lock

HOLD = """
import sys, time
from pathlib import Path
from jaxlm.run import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_by_name_until_the_first_is_gone(tmp_path, holder):
    words = rf"is in use: process {holder.pid} on '.+' since \d{{4}}-.* trains it; wait for that process, or stop it"
    with pytest.raises(UserError, match=words), lock.held(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.NAME).exists()  # a killed process leaves the file, but no lock
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock.held(tmp_path):
            pass  # nor twice in one process
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", '{"pid": "x"}'])
def test_a_lock_file_that_says_nothing_still_locks(tmp_path, content):
    with lock.held(tmp_path):
        (tmp_path / lock.NAME).write_text(content)
        with pytest.raises(UserError, match="is in use: another process trains it"), lock.held(tmp_path):
            pass


def test_a_lock_on_a_file_that_was_removed_is_taken_again(tmp_path, monkeypatch):
    """Between opening and locking, the holder may remove the file, and a third process make a new one."""
    flock, calls = lock.fcntl.flock, []

    def removed_first(opened, how):
        if not calls:
            (tmp_path / lock.NAME).unlink()
        calls.append(opened)
        flock(opened, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_first)
    with lock.held(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / lock.NAME).exists()


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch):
    def no_locks(opened, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with (
        pytest.warns(UserWarning, match="without locks .No locks available.: let no second process"),
        lock.held(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def read_only(*args):
        raise OSError(lock.errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", read_only)
    words = r"\(Read-only file system\): training writes into the run; copy it to a place that can be written"
    with pytest.raises(UserError, match=words), lock.held(tmp_path):
        pass


def test_training_sweeps_what_kills_have_left(tmp_path):
    for leftover in ("checkpoints/.4.77.partial/params", ".config.json.77.partial", "samples/.a.txt.7.partial"):
        (tmp_path / leftover).mkdir(parents=True)
    (tmp_path / "checkpoints" / "4").mkdir()
    with lock.for_training(tmp_path):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "checkpoints",
        "checkpoints/4",
        "samples",
    ]


def test_new_runs_that_were_killed_are_swept_and_those_being_written_stay(tmp_path):
    killed, living, other = (tmp_path / name for name in (".a[1].7.partial", ".a[1].8.partial", ".a1.9.partial"))
    for folder in (killed, living, other):
        folder.mkdir()
    (killed / lock.NAME).write_text("{}")
    with lock.held(living), warnings.catch_warnings():
        lock.sweep_beginnings(tmp_path / "a[1]")
    assert not killed.exists()
    assert living.is_dir()
    assert other.is_dir()
