"""Text of files and models cannot move the cursor of a terminal, name its window or turn its lines."""

import io
import json

import pytest
from fuzz_targets import _make_listing
from support import command

from jaxlm import terminal
from jaxlm.cli import main, output
from jaxlm.config import TrainConfig
from jaxlm.run.progress import Progress

ATTACK = "a\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\u202egnp\r\x00b"
SPELLED = "a\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\x7f\\u202egnp\\x0d\\x00b"


def test_control_characters_are_spelled_out_and_text_stays():
    assert terminal.printable(ATTACK) == SPELLED
    for text in ("line\n\tnext", "é漢🙂", "\ufeff\ufffd\ud800"):
        assert terminal.printable(text) == text


def test_json_stays_the_same_and_moves_no_terminal(capsys):
    output.print_json({ATTACK: [ATTACK, "é漢🙂"]})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {ATTACK: [ATTACK, "é漢🙂"]}
    assert "é漢🙂" in shown
    assert not set(shown) & {"\x1b", "\x9b", "\x07", "\x7f", "\u202e", "\r"}


def test_a_message_is_one_bounded_line():
    assert terminal.one_line("a\nb\t c\x1bd") == "a b c\\x1bd"
    line = terminal.one_line("x" * 10**6 + "end")
    assert len(line) < terminal.LONGEST + 100
    assert line.startswith("xxx")
    assert "characters left out" in line
    assert line.endswith("xend")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_samples_are_exact_in_a_pipe_and_spelled_out_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert terminal.for_stdout(ATTACK) == ATTACK
    monkeypatch.setattr("sys.stdout", Terminal())
    assert terminal.for_stdout(ATTACK) == SPELLED


def test_errors_warnings_tables_and_progress_are_spelled_out(capsys):
    main._fail(ValueError(ATTACK), 2)
    main._show_warning(ATTACK, UserWarning, "file", 1)
    output.print_table(ATTACK, ["column"], [[ATTACK]])
    Progress(TrainConfig(), 0).say(ATTACK)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\\x1b[2J" in "".join(text.split())
        assert not set(text) & {"\x1b", "\x9b", "\x07", "\x7f", "\u202e", "\r"}


@pytest.mark.parametrize("where", ["preset", "name"])
def test_a_run_of_another_cannot_reach_the_terminal(tmp_path, where):
    _make_listing(tmp_path)
    run = tmp_path / "runs" / "tiny-1"
    if where == "preset":
        record = json.loads((run / "config.json").read_text())
        record["config"]["preset"] = ATTACK
        (run / "config.json").write_text(json.dumps(record))
    else:
        run.rename(run.parent / ATTACK.replace("\x00", ""))
    code, out, err = command("runs", tmp_path / "runs")
    assert code == 0, err
    assert "x1b[2J" in "".join(out.split())
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(out + err)
