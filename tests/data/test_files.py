"""Files written all at once or not at all, and the refusal of what is not UTF-8."""

import json
import os
import shutil
from pathlib import Path

import pytest

from jaxlm.data.files import check_utf8, decode_utf8, read_sealed, remove, sealed, staged
from jaxlm.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, content, error=None, folder=False, **options):
    """Stages a file, or a folder with one, and then raises `error`."""
    with staged(target, **options) as path:
        if folder:
            path.mkdir()
        (path / "b.txt" if folder else path).write_text(content)
        if error is not None:
            raise error


def test_a_file_is_there_only_when_the_block_has_ended(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with staged(target) as path:
        path.write_text("half")
        assert not target.exists()
        path.write_text("whole")
    assert target.read_text() == "whole"
    with staged(target) as path:
        path.write_text("other")
        assert target.read_text() == "whole"
    assert target.read_text() == "other"
    assert names(target.parent) == ["a.txt"]


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", "old", folder=True)
    with pytest.raises(UserError, match="run was created by another process in the meantime: free some space"):
        write(tmp_path / "run", "new", folder=True)
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "b.txt").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), UserError("y")])
@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_raises_leaves_nothing_and_the_old_content(tmp_path, error, folder):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)):
        write(tmp_path / "a.txt", "new", error, folder)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("5 items requested"), "5 items req"),
    ],
)
def test_an_error_of_the_system_becomes_one_line_with_its_reason(tmp_path, error, reason):
    with pytest.raises(UserError, match=rf"a.txt cannot be written \({reason}.*\): buy a disk"):
        write(tmp_path / "a.txt", "half", error, fix="buy a disk")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a.txt cannot be written"):
        write(tmp_path / "file" / "a.txt", "a")
    with pytest.raises(UserError, match=r"a.txt cannot be written \(No such file"), staged(tmp_path / "a.txt"):
        pass  # writes nothing


def test_bytes_that_are_not_utf8_are_named():
    assert decode_utf8("zwölf".encode(), "it") == "zwölf"
    with pytest.raises(UserError, match="it is not UTF-8: byte 0xff at offset 6; convert it to UTF-8 first"):
        decode_utf8("zwölf".encode() + b"\xff", "it")
    with pytest.raises(UserError, match="it is not UTF-8: byte 0xff at offset 4, line 3"):
        decode_utf8(b"a\nb\n\xff", "it", lines=True)


@pytest.mark.parametrize(("text", "byte"), [("ä\udcff", "0xff"), ("ä\ud800", "0xed")])
def test_text_that_python_could_not_decode_is_named_by_its_byte(text, byte):
    check_utf8("ä", "prompt")
    with pytest.raises(UserError, match=f"prompt is not UTF-8: byte {byte} at offset 2"):
        check_utf8(text, "prompt")


def test_what_has_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """A loss of power may take what is not: the content goes there before the name, and the name before the end."""
    order, fsync, replace = [], os.fsync, Path.replace

    def noting_fsync(opened):
        order.append(Path(os.readlink(f"/proc/self/fd/{opened}")).name)
        fsync(opened)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("renamed"), replace(self, to)))
    write(tmp_path / "run", "x", folder=True)
    assert order == ["b.txt", f".run.{os.getpid()}.partial", "renamed", tmp_path.name]


def test_a_folder_is_removed_under_a_name_that_says_so(tmp_path, monkeypatch):
    (tmp_path / "12" / "params").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed before
    remove(tmp_path / "12")
    assert names(tmp_path) == [f".12.{os.getpid()}.removed.partial"]
    remove(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 2, "sha256": "SEAL"}', "was changed after it was written .its sha256 is another.: restore it"),
        (b'{"a": 1, "b": 1, "sha256": "SEAL"}', "was changed after it was written"),
        (b'{"a": 1', r"cannot be read as JSON \(.*\): restore it"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[]", "does not hold a JSON object: restore it"),
        (None, r"cannot be read \(No such file or directory\): restore it"),
    ],
)
def test_sealed_json_shows_a_change(tmp_path, content, words):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content.replace(b"SEAL", sealed({"a": 1})["sha256"].encode()))
    with pytest.raises(UserError, match=words):
        read_sealed(file, "restore it")


def test_sealed_json_reads_as_it_was(tmp_path):
    file, content = tmp_path / "a.json", {"b": [1, 2.5, None], "a": {"é": "x"}}
    file.write_text(json.dumps(sealed(content), indent=3))
    assert read_sealed(file, "") == sealed(content)
    file.write_text(json.dumps({**sealed(content), "a": {"é": "x"}}, sort_keys=True))  # the order is not content
    assert read_sealed(file, "") == sealed(content)
    file.write_text(json.dumps(content))  # of an older version
    assert read_sealed(file, "") == content
