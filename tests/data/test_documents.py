"""Documents of .txt, .jsonl and .parquet files: what they are, from which place, and what is refused."""

import gzip
import json
import lzma
import os
import sys

import pytest

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data import documents
from jaxlm.data.documents import find_sources, read_pieces


def pieces_of(path, may_cut=True, **fields):
    cfg = PrepareConfig(path=str(path), **fields)
    return list(read_pieces(find_sources(cfg), cfg, may_cut))


def texts_of(path, **fields):
    """The documents, joined from their pieces."""
    joined = [""]
    for piece in pieces_of(path, **fields):
        joined[-1] += piece.text
        joined += [""] * piece.is_last
    assert joined.pop() == ""
    return joined


def json_lines(path, *texts):
    path.write_text("".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    json_lines(tmp_path / "b" / "z.jsonl", "three", "four")
    (tmp_path / "b" / "a.txt").write_text("two\r\nlines\n")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.md").write_text("no document")
    assert texts_of(tmp_path) == ["one", "two\r\nlines\n", "three", "four"]
    assert texts_of(tmp_path / "b" / "z.jsonl") == ["three", "four"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["one", "two\r\nlines\n"]
    assert [source.name for source in find_sources(PrepareConfig(path=str(tmp_path)))] == [
        *("a.txt", "b/a.txt", "b/z.jsonl")
    ]


def test_links_are_followed_and_each_file_counts_once(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "far.TXT").write_text("far")
    json_lines(folder / "sub" / "b.JSONL", "near")
    (folder / "a").symlink_to(other)
    (folder / "again").symlink_to(other)
    (folder / "c.txt").symlink_to(other / "far.TXT")
    (folder / "sub" / "loop").symlink_to(folder)
    assert len(list(documents._walk(folder))) == 3  # c.txt and what two folders hold, once
    for path in (folder, folder / "**"):
        sources = find_sources(PrepareConfig(path=str(path)))
        assert [source.name for source in sources] == ["a/far.TXT", "sub/b.JSONL"]
        assert texts_of(path) == ["far", "near"]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path, tmp_path / "pipe.txt", tmp_path / "*"):
        with pytest.raises(ValueError, match=r"pipe.txt is not a regular file: leave it out"):
            find_sources(PrepareConfig(path=str(path)))


def test_compressed_files_give_the_documents_that_they_hold(tmp_path):
    lines = json_lines(tmp_path / "lines", "one", "two", "three").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.TXT.xz").write_bytes(lzma.compress(b"four\n-\nfive\n"))
    (tmp_path / "lines").unlink()
    cfg = PrepareConfig(path=str(tmp_path), separator="-")
    sources = find_sources(cfg)
    assert [(source.kind, source.extent) for source in sources] == [(".jsonl", len(lines)), (".txt", 12)]
    pieces = pieces_of(tmp_path, separator="-")
    assert [piece.text for piece in pieces] == ["one", "two", "three", "four\n", "five\n"]
    for i, piece in enumerate(pieces):
        assert list(read_pieces(sources, cfg, True, piece.place)) == pieces[i:]
    before = [sources[piece.place.source].bytes_before(piece.place) for piece in pieces]
    assert before[0] == before[3] == 0
    assert 0 < before[1] < before[2] < sources[0].bytes
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines + b"{"))
    with pytest.raises(ValueError, match=r"a.jsonl.gz, line 4 is not JSON"):
        pieces_of(tmp_path)


@pytest.mark.parametrize("separator", [None, "-"])
def test_a_byte_order_mark_is_no_text(tmp_path, separator):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "\xef\xbb\xbftwo"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf-\nthree\n")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb")
    cfg = PrepareConfig(path=str(tmp_path), separator=separator)
    with pytest.raises(ValueError, match=r"d.txt is not UTF-8: byte 0xef at offset 0"):
        pieces_of(tmp_path, separator=separator)
    (tmp_path / "d.txt").unlink()
    assert texts_of(tmp_path, separator=separator) == ["one", "\ufefftwo", "three\n" if separator else "-\nthree\n"]
    pieces = pieces_of(tmp_path, separator=separator)
    for i, piece in enumerate(pieces):
        assert list(read_pieces(find_sources(cfg), cfg, True, piece.place)) == pieces[i:]


@pytest.mark.parametrize("read", [3, 1 << 18])
@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        (None, ["ä b\n\n---\r\nc\n --- \n\n\nd"]),
        ("---", ["ä b\n\n", "c\n --- \n\n\nd"]),
        ("", ["ä b\n", "---\r\nc\n --- \n", "d"]),
    ],
)
def test_a_line_that_is_the_separator_ends_a_document(tmp_path, monkeypatch, read, separator, expected):
    monkeypatch.setattr(documents, "READ", read)
    (tmp_path / "a.txt").write_bytes("ä b\n\n---\r\nc\n --- \n\n\nd".encode())
    assert texts_of(tmp_path / "a.txt", separator=separator) == expected


def test_documents_without_a_character_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    json_lines(tmp_path / "b.jsonl", "", "one", "")
    (tmp_path / "c.txt").write_text("--\n--\ntwo\n--\n")
    assert texts_of(tmp_path, separator="--") == ["one", "two\n"]


def test_long_documents_are_cut_where_a_word_begins_and_reading_goes_on_from_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 5)
    monkeypatch.setattr(documents, "READ", 4)
    json_lines(tmp_path / "a.jsonl", "to be, or  not to be", "", "short")
    (tmp_path / "b.txt").write_text("that is\nthe question\n--\nwhether\n")
    cfg = PrepareConfig(path=str(tmp_path), separator="--")
    sources = find_sources(cfg)
    pieces = list(read_pieces(sources, cfg, True))
    assert "".join(piece.text for piece in pieces) == "to be, or  not to beshortthat is\nthe question\nwhether\n"
    assert len(pieces) > 6
    assert all(piece.text[0] in " \n" for piece in pieces if piece.place.part)
    for i, piece in enumerate(pieces):
        assert list(read_pieces(sources, cfg, True, piece.place)) == pieces[i:]
    whole = list(read_pieces(sources, cfg, False))
    assert [piece.is_last for piece in whole] == [True] * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', r"a.jsonl, line 2 has no field 'text': name one of body by --field"),
        ('{"text": "a"}\n\n{"text": "b"\n', r"a.jsonl, line 3 is not JSON \(Expecting ',' delimiter\): correct or"),
        ('["a"]\n', "a.jsonl, line 1 is not a JSON object: remove it"),
        ('{"text": 5}\n', "a.jsonl, line 1 has text = 5: give a text there"),
        ('{"text": "\\ud83d"}\n', "a.jsonl, line 1 has half a surrogate pair in text"),
        (f'{{"text": "{"x" * 200}"}}\n', r"a.jsonl, line 1 is not JSON \(it has more than 100 bytes\)"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl is not UTF-8: byte 0xff at offset 24"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(documents, "DOCUMENT_LIMIT", 100)
    (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        pieces_of(tmp_path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": "a", "more": ' + "[" * 64 + "]" * 64 + "}"])
def test_a_line_that_is_nested_too_deeply_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 .* nested deeper than 64\): correct or remove it"):
        pieces_of(tmp_path)


@pytest.mark.parametrize("separator", [None, "-"])
@pytest.mark.parametrize(
    ("content", "place"), [(b"z\xc3\xb6lf\n\xff", "0xff at offset 6"), (b"z\xc3", "0xc3 at offset 1")]
)
def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(tmp_path, monkeypatch, separator, content, place):
    monkeypatch.setattr(documents, "READ", 2)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt is not UTF-8: byte {place}"):
        pieces_of(tmp_path, separator=separator)


def test_what_is_no_corpus_is_refused(tmp_path):
    for path, words in (
        (tmp_path, "no .txt, .jsonl or .parquet file is in it"),
        (tmp_path / "x", "there is no such file or folder, and the pattern names no"),
    ):
        with pytest.raises(ValueError, match=words):
            pieces_of(path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"x.csv is not a .txt, .jsonl or .parquet file"):
        pieces_of(tmp_path / "x.csv")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"gone.txt cannot be read \(No such file or directory\)"):
        pieces_of(tmp_path)


@pytest.mark.parametrize(("may_cut", "words"), [(True, "without a space"), (False, "which this tokenizer reads at")])
def test_a_document_that_no_piece_can_hold_is_refused(tmp_path, monkeypatch, may_cut, words):
    monkeypatch.setattr(documents, "PIECE", 5)
    monkeypatch.setattr(documents, "DOCUMENT_LIMIT", 50)
    (tmp_path / "a.txt").write_text("to be, or not to be, that is the question, to be, or not")
    if may_cut:
        assert len(pieces_of(tmp_path)) > 5
        (tmp_path / "a.txt").write_text("x" * 60)
    with pytest.raises(ValueError, match=f"a.txt: the document at byte 0 has more than 50 characters {words}"):
        pieces_of(tmp_path, may_cut)


# Parquet -------------------------------------------------------------------------------------------------------------


def test_parquet_needs_an_extra_and_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow, .* install jaxlm\[data\]"):
        pieces_of(tmp_path)


def parquet(path, **columns):
    table = pytest.importorskip("pyarrow").table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=3)
    return path


def test_a_column_of_parquet_is_read_from_any_row(tmp_path, monkeypatch):
    texts = [f"Satz {i} ö" for i in range(8)]
    parquet(tmp_path / "a.parquet", body=texts, n=list(range(8)))
    monkeypatch.setattr(documents, "ROWS", 2)
    assert texts_of(tmp_path, field="body") == texts
    cfg = PrepareConfig(path=str(tmp_path), field="body")
    pieces = pieces_of(tmp_path, field="body")
    for i, piece in enumerate(pieces):
        assert list(read_pieces(find_sources(cfg), cfg, True, piece.place)) == pieces[i:]
    for field, words in (("text", "has no column 'text': name one of body, n by"), ("n", "'n' is of type int64")):
        with pytest.raises(ValueError, match=words):
            pieces_of(tmp_path, field=field)


def test_a_damaged_parquet_file_and_a_row_without_text_are_named(tmp_path):
    parquet(tmp_path / "a.parquet", text=["one", None])
    with pytest.raises(ValueError, match=r"a.parquet, row 1 has no text: remove it"):
        pieces_of(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet is not a .parquet file"):
        pieces_of(tmp_path)
