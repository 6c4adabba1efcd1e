"""Files written all at once or not at all, and the refusal of what is not UTF-8."""

import pytest

from jaxlm.data.files import check_utf8, decode_utf8, staged
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
