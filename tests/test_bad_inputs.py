"""What the commands answer to bad input of every kind: exit code 1 or 2, one line, nothing written, no traceback."""

import runpy
from pathlib import Path

import pytest
from bad_files import COMMANDS

BAD_INPUTS = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "bad_inputs.py"))
QUICK = [command for command in COMMANDS if not command.startswith("train")][::9]
"""A few of every kind; each takes a tenth of a second or more, most of it in reading the options."""


def test_there_are_bad_inputs_of_every_kind():
    assert len(set(COMMANDS)) == len(COMMANDS) >= 120


def check(commands, folder):
    there = BAD_INPUTS["commands"]()
    found = BAD_INPUTS["answers"]([command for command in commands if command in there], folder)
    assert [one for one in found if one.problem] == []


def test_bad_input_is_answered_by_one_line(tmp_path):
    check(QUICK, tmp_path)


@pytest.mark.slow
def test_all_bad_input_is_answered_by_one_line(tmp_path):
    check(COMMANDS, tmp_path)


def test_a_wrong_answer_is_noticed(tmp_path):
    found = BAD_INPUTS["answers"](["sample config-empty", "presets", "", "sample tokenizer-size"], tmp_path)
    assert [bool(one.problem) for one in found] == [False, True, False, False]
    summary = "4 bad inputs, 2 answered by one line and exit code 1 or 2; the empty command prints how it is used"
    assert BAD_INPUTS["summary_of"](found).startswith(summary)
    assert found[2].message == "(the usage)"
    assert "tokenizer.json has 40 entries, the model 30" in found[3].message
