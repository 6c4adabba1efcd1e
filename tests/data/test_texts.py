"""A text from files, folders, patterns, compressed files, fields of .jsonl and stdin; and how it is known again."""

import gzip
import hashlib
import io
import json
import os
import stat
from pathlib import Path

import pytest

from jaxlm.data import documents, texts
from jaxlm.data.texts import open_text, with_stdin_kept
from jaxlm.errors import UserError


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A working folder and a data cache of the test's own, with some texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "cache"))
    for name, text in {"one.txt": "ein\r\nzwölf", "two.txt": "two\n", "f/b.txt": "b", "f/a/z.TXT": "z\n"}.items():
        write(name, text.encode())
    write(
        "lines.jsonl",
        "".join(json.dumps({"text": t, "body": t[::-1]}) + "\n" for t in ("ab", "", "cd\n", "e")).encode(),
    )
    write("f/c.md", b"not read")


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def text_of(paths, field="text"):
    return "".join(open_text(paths, field).blocks())


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ("one.txt", "ein\r\nzwölf"),
        (("one.txt", "two.txt"), "ein\r\nzwölf\ntwo\n"),  # a line feed only where none is
        (("two.txt", "one.txt"), "two\nein\r\nzwölf"),
        ("f", "z\nb"),
        ("*.txt", "ein\r\nzwölf\ntwo\n"),
        ("lines.jsonl", "ab\ncd\ne"),
        (("lines.jsonl", "f"), "ab\ncd\ne\nz\nb"),
        (("one.txt", "one.txt"), "ein\r\nzwölf\nein\r\nzwölf"),
        ("f/c.md", "not read"),  # a file that is named is a text, whatever its name
    ],
)
def test_a_text_is_its_documents_in_order(paths, text, monkeypatch):
    assert text_of(paths) == text
    monkeypatch.setattr(documents, "READ", 3)
    monkeypatch.setattr(texts, "BLOCK_CHARS", 4)
    opened = open_text(paths, "text")
    assert list(opened.blocks()) == [text[i : i + 4] for i in range(0, len(text), 4)]
    assert opened.size >= len(text) - 3  # the line feeds between files are not counted
    for start in range(len(text) + 1):
        for stop in (start, start + 1, start + 5, None):
            assert "".join(opened.blocks((start, stop))) == text[start:stop]


def test_another_field_of_jsonl_and_its_refusal():
    assert text_of("lines.jsonl", "body") == "ba\n\ndc\ne"
    with pytest.raises(UserError, match=r"line 1 has no field 'title': name one of text, body by --data.field"):
        text_of("lines.jsonl", "title")


def test_compressed_files_are_the_texts_they_hold():
    write("one.txt.gz", gzip.compress(Path("one.txt").read_bytes()))
    write("g/lines.jsonl.gz", gzip.compress(Path("lines.jsonl").read_bytes()))
    assert text_of(("one.txt.gz", "g")) == "ein\r\nzwölf\nab\ncd\ne"
    assert open_text("one.txt.gz", "text").sha256 == open_text("one.txt", "text").sha256
    assert open_text("g", "text").sha256 == open_text("lines.jsonl", "text").sha256
    write("cut.txt.gz", gzip.compress(b"a" * 999)[:-9])
    with pytest.raises(UserError, match="cut.txt.gz is not a whole .gz file"):
        open_text("cut.txt.gz", "text")


def test_a_text_is_known_by_its_bytes_and_their_order_not_by_names():
    def known(*paths, field="text"):
        return open_text(paths, field).sha256

    assert known("one.txt") == hashlib.sha256(Path("one.txt").read_bytes()).hexdigest()  # as ever
    both = known("one.txt", "two.txt")
    write("g/1.txt", Path("one.txt").read_bytes())
    write("g/2.txt", Path("two.txt").read_bytes())
    assert known("g") == both
    lines = "".join(f".txt {hashlib.sha256(Path(name).read_bytes()).hexdigest()}\n" for name in ("one.txt", "two.txt"))
    assert both == hashlib.sha256(lines.encode()).hexdigest()
    write("lines.txt", Path("lines.jsonl").read_bytes())
    different = [
        both,
        known("two.txt", "one.txt"),
        known("lines.jsonl"),
        known("lines.jsonl", field="body"),
        known("lines.txt"),
        known("one.txt"),
    ]
    assert len(set(different)) == 6


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("none.txt", "corpus none.txt does not exist: give an existing UTF-8 text or prepared corpus by --data.path"),
        (("one.txt", "none"), "corpus none does not exist"),
        ("*.csv", "corpus [*].csv: there is no such file or folder, and the pattern names no"),
        ("empty", "corpus empty: no .txt, .jsonl or .parquet file is in it"),
        ("pipe", "pipe is a pipe, which can be read once: give - for stdin, and lead the pipe there"),
        ("bad.txt", "bad.txt is not UTF-8: byte 0xff at offset 5; convert it to UTF-8 first"),
    ],
)
def test_what_cannot_be_read_is_named(paths, words):
    Path("empty").mkdir()
    os.mkfifo("pipe")
    write("bad.txt", b"right\xff")
    with pytest.raises(UserError, match=words):
        text_of(paths)


def test_marks_are_left_out_in_each_file_or_kept():
    write("m1.txt", b"\xef\xbb\xbfa\n")
    write("m2.txt", b"\xef\xbb\xbfb")
    paths = "m1.txt", "two.txt", "m2.txt"
    assert text_of(paths) == "a\ntwo\nb"
    assert open_text(paths, "text").marked == {0, 2}
    assert "".join(open_text(paths, "text", keep_marks=True).blocks()) == "\ufeffa\ntwo\n\ufeffb"


class Stdin:
    def __init__(self, content):
        self.buffer, self.closed = io.BytesIO(content), False


def test_stdin_is_kept_under_its_sha256(monkeypatch, tmp_path):
    content = b"from a pipe\n"
    monkeypatch.setattr("sys.stdin", Stdin(content))
    kept = with_stdin_kept("-")
    assert kept == str(tmp_path / "cache" / "stdin" / f"{hashlib.sha256(content).hexdigest()}.txt")
    assert Path(kept).read_bytes() == content
    assert stat.S_IMODE(Path(kept).stat().st_mode) == 0o600
    monkeypatch.setattr("sys.stdin", Stdin(content))  # the same text again
    assert with_stdin_kept(("one.txt", "-")) == ("one.txt", kept)
    assert [path.name for path in (tmp_path / "cache/stdin").iterdir()] == [Path(kept).name]
    assert (with_stdin_kept("one.txt"), with_stdin_kept(None)) == ("one.txt", None)
    assert open_text(kept, "text").sha256 == hashlib.sha256(content).hexdigest()


def test_stdin_that_cannot_be_kept_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    class Unreadable:
        def read(self, size):
            raise OSError(9, "Bad file descriptor")

    def full(source, target):
        raise OSError(28, "No space left on device")

    stdin = Stdin(b"")
    stdin.buffer = Unreadable()
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(UserError, match=r"stdin cannot be read \(Bad file descriptor\): give a text by a pipe, or a"):
        with_stdin_kept("-")
    monkeypatch.setattr("sys.stdin", Stdin(b"a"))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(UserError, match=r"cache/stdin cannot be written \(No space left .*: set JAXLM_DATA_DIR"):
            with_stdin_kept("-")
    assert list((tmp_path / "cache/stdin").iterdir()) == []
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="is stdin, which is closed: give a text by a pipe, or a file"):
        with_stdin_kept("-")
