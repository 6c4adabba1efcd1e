"""Progress on stderr: plain lines, the bar, and the time that is left."""

import io
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import rich.console

from jaxlm.config import TrainConfig
from jaxlm.run import progress
from jaxlm.run.progress import Clock, Progress

CFG = TrainConfig(steps=100, log_every=10, eval_every=40)


def row(step, **fields):
    return {"step": step, "loss": 2.0, "tokens_per_s": 1234.0, **fields}


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets."""
    time = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: time[0])
    return time


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_the_time_left_counts_no_compilation_and_the_evaluations_to_come():
    clock = Clock(CFG)
    assert clock.remaining(0) is None
    clock.add_chunk(1, 60.0)  # compiling
    assert clock.remaining(1) is None
    clock.add_chunk(9, 0.9)
    assert clock.remaining(10) == pytest.approx(90 * 0.1)
    clock.eval_seconds = 7.0
    assert clock.remaining(10) == pytest.approx(90 * 0.1 + 3 * 7.0)  # at 40, 80 and 100
    assert clock.remaining(40) == pytest.approx(60 * 0.1 + 2 * 7.0)
    assert clock.remaining(99) == pytest.approx(0.1 + 7.0)
    assert clock.remaining(100) is None


def test_plain_lines_come_at_most_every_five_seconds_and_the_first_has_no_eta(capsys, now):
    shown = Progress(CFG, 0)
    shown.clock.add_chunk(1, 60.0)
    shown.show(row(1))
    assert lines(capsys) == ["step 1/100  loss 2.0000  1,234 tokens/s"]
    shown.clock.add_chunk(9, 0.9)
    shown.show(row(10))
    assert lines(capsys) == []
    now[0] += 6
    shown.show(row(20, gflops_per_s=12.34))
    assert lines(capsys) == ["step 20/100  loss 2.0000  1,234 tokens/s  12.3 GFLOP/s  eta 8s"]
    now[0] += 6
    shown.show(row(20, mfu=0.4123))
    assert lines(capsys) == ["step 20/100  loss 2.0000  1,234 tokens/s  41.2% MFU  eta 8s"]
    shown.show({"step": 30, "val_loss": 1.5, "eval_batches": 4})  # an estimate
    assert lines(capsys) == ["step 30/100  loss 2.0000  val ~1.5000  1,234 tokens/s  41.2% MFU  eta 7s"]
    shown.show({"step": 40, "val_loss": 1.5})
    assert lines(capsys) == ["step 40/100  loss 2.0000  val 1.5000  1,234 tokens/s  41.2% MFU  eta 6s"]
    shown.show(row(100))
    assert lines(capsys) == ["step 100/100  loss 2.0000  val 1.5000  1,234 tokens/s"]
    shown.show({"step": 100, "tokens_per_s": 1.0})  # a skipped step
    assert lines(capsys) == ["step 100/100  val 1.5000  1 tokens/s"]
    shown.close()


def test_a_long_evaluation_is_not_silent(capsys, now):
    shown = Progress(CFG, 0)
    shown.evaluating(40)
    assert lines(capsys) == ["step 40/100  evaluating"]  # how long it takes is not known yet
    shown.evaluating(40, 0.2)
    assert lines(capsys) == []
    now[0] += 6
    shown.evaluating(40, 0.4)
    assert lines(capsys) == ["step 40/100  evaluating 40%"]
    shown.clock.eval_seconds = 4.0
    shown.evaluating(80)
    assert lines(capsys) == []
    shown.clock.eval_seconds = 6.0
    shown.evaluating(100)
    assert lines(capsys) == ["step 100/100  evaluating"]


def test_a_dumb_terminal_gets_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    shown = Progress(CFG, 0)
    shown.show(row(1))
    assert lines(capsys) == ["step 1/100  loss 2.0000  1,234 tokens/s"]


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(rich.console, "Console", lambda **_: terminal)
    shown = Progress(CFG, 0)
    shown.clock.add_chunk(1, 60.0)
    shown.clock.add_chunk(9, 0.9)
    shown.show(row(10))
    shown.evaluating(40, 0.25)
    shown._bar.refresh()  # it refreshes itself ten times a second
    shown.say("a line [of] its own")
    shown.move(50)
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for words in (
        "0/100 compiling",
        "40/100 evaluating 25%",
        "a line [of] its own",
        "50/100 loss 2.0000  1,234 tokens/s  eta 5s",
    ):
        assert words in text


def test_a_notebook_gets_one_line_that_changes(monkeypatch, capsys, now):
    shown, updates = [], []
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")

    def show(data, raw, display_id):
        assert (raw, display_id) == (True, True)
        shown.append(data["text/plain"])
        return SimpleNamespace(update=lambda data, raw: updates.append(data["text/plain"]))

    display.display = show
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    console = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: console(force_jupyter=True))
    progress = Progress(CFG, 0)
    progress.show(row(1))
    assert shown == ["step 1/100  loss 2.0000  1,234 tokens/s"]
    progress.move(5)
    assert updates == []  # half a second is not over
    now[0] += 1
    progress.move(8)
    progress.evaluating(40)
    progress.say("skipped")
    progress.close()
    assert updates == ["step 8/100  loss 2.0000  1,234 tokens/s", "step 40/100  evaluating"]
    assert len(shown) == 1
    assert lines(capsys) == ["skipped"]


def test_a_process_that_shows_nothing_shows_nothing(capsys):
    quiet = Progress(CFG, 0, shown=False)
    quiet.show(row(1))
    quiet.evaluating(40)
    quiet.show(row(40, val_loss=2.0))
    quiet.say("saved")
    quiet.close()
    assert lines(capsys) == []
