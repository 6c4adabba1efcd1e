"""`jaxlm attend`: a picture of every head."""

import json

import pytest
from support import command, refused, snapshot


def test_attend_draws_every_head(folder):
    code, out, _ = command("attend", "runs/tiny-1", "--text", "to be,", "--out", "maps.png", "--json")
    assert code == 0
    assert json.loads(out)["maps"] == [[2, 6, 6]]
    assert (folder / "maps.png").read_bytes().startswith(b"\x89PNG")
    (folder / "maps.png").unlink()


def test_options_may_stand_before_the_run(folder):
    code, out, _ = command("attend", "--text", "to be,", "runs/tiny-1")
    assert code == 0
    assert out == "runs/tiny-1/attention.png: 1 layers of 2 maps, step 30\n"
    (folder / "runs/tiny-1/attention.png").unlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--text is missing; see jaxlm attend --help"),
        (["--txt", "two"], "--text is missing; unknown: --txt, two; see jaxlm attend --help"),
        (["--text", ""], "text is empty"),
        (["--text", "x" * 33], "33 tokens are beyond the learned position table"),
        (["--text", "two", "--out", "no/such/folder.png"], "folder.png cannot be written (No such file or directory)"),
        (["--text", "two", "--out", "map"], "map cannot be written: give --out a file with a suffix"),
        (["--text", "two", "--out", "map.txt"], "map.txt cannot be written (Format 'txt'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(folder, arguments, words):
    before = snapshot(folder)
    assert words in refused("attend", "runs/tiny-1", *arguments)
    assert snapshot(folder) == before
