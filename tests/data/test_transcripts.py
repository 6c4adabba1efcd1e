"""Transcripts: how files become rows, what is refused, and a run on them by the command."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import transcripts
from jaxlm.data.tokenizer import TranscriptTokenizer

TOKENIZER = TranscriptTokenizer()


def read_texts(path):
    return [TOKENIZER.decode(ids) for ids in transcripts.read(transcripts.find_files(path), TOKENIZER)]


def spelled(rows):
    return [TOKENIZER.decode(row).replace("<eos>", "|").replace("<pad>", "_") for row in rows]


def cut(*texts, seq_len):
    return transcripts.cut([TOKENIZER.encode(text) for text in texts], TOKENIZER, seq_len)


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_framed_and_padded():
    rows = cut("IT'S", "A B", "", seq_len=6)
    assert rows.dtype == np.uint8
    assert spelled(rows) == ["|IT'S|_", "|A B|__", "||_____"]


def test_a_long_transcript_takes_several_rows_that_share_one_token():
    assert spelled(cut("ABCDEFGH", "X", seq_len=4)) == ["|ABCD", "DEFGH", "H|___", "|X|__"]
    assert spelled(cut("ABC", "ABCD", seq_len=4)) == ["|ABC|", "|ABCD", "D|___"]


@given(st.lists(st.text("AB' ", max_size=30), min_size=1, max_size=5), st.integers(1, 12))
def test_every_target_is_in_exactly_one_row(texts, seq_len):
    rows = cut(*texts, seq_len=seq_len)
    assert rows.shape[1] == seq_len + 1
    targets = rows[:, 1:]
    joined = TOKENIZER.decode(targets[targets != TOKENIZER.pad_token])
    assert joined == "".join(text + "<eos>" for text in texts)
    expected = [t for text in texts for t in [28, *TOKENIZER.encode(text)]]  # what each target follows
    assert rows[:, :-1][targets != TOKENIZER.pad_token].tolist() == expected


def test_no_transcript_gives_no_row():
    assert cut(seq_len=5).shape == (0, 6)


# CSV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_in_the_order_of_its_rows(tmp_path, newline, mark):
    lines = [mark + "id,transcript", "b-1,IT'S LATE", 'a-1,"SO IT IS"', "c-1,"]
    (tmp_path / "a.csv").write_bytes("".join(line + newline for line in lines).encode())
    assert read_texts(tmp_path / "a.csv") == ["IT'S LATE", "SO IT IS", ""]


def test_a_folder_of_tables_is_read_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.csv", "SECOND"), ("a.csv", "FIRST")):
        (tmp_path / name).write_text(f"id,transcript\n1,{text}\n")
    (tmp_path / "notes.txt").write_text("no table")
    assert read_texts(tmp_path) == ["FIRST", "SECOND"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,transcript\n1,GOOD\n2,CAFÉ!\n", "a.csv row 3: characters '!É' are outside the vocabulary (first 'É' at"),
        ("id,transcript\n1,good\n", "row 2: characters 'dgo' are outside the vocabulary (first 'g' at position 0)"),
        ("id,transcript\n1,good\n", "write letters in upper case"),
        ('id,transcript\n"1\n2",GOOD\n3,A\tB\n', "row 3: characters '\\t' are outside"),
        ("id,text\n1,A\n", "a.csv row 1: header is 'id,text': write 'id,transcript'"),
        ("1,A\n2,B\n", "a.csv row 1: header is '1,A'"),
        ("id,transcript\n1,A\n2,B,C\n", "a.csv row 3: 3 columns instead of 2"),
        ("id,transcript\n1\n", "a.csv row 2: 1 columns instead of 2"),
        ('id,transcript\n1,A\n2,"B\n', "a.csv row 3: not CSV (unexpected end of data)"),
        ("", "a.csv is empty"),
        ("id,transcript\n1,CAF\udcc9\n", "a.csv is not UTF-8: byte 0xc9 at offset 19, line 2"),
    ],
)
def test_a_bad_table_is_named_with_its_row(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="write|use only|convert|begin|correct") as error:
        read_texts(tmp_path / "a.csv")
    assert words in str(error.value)


# Arrays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        ["<sos>", "A", " ", "B", "<eos>"],
        ["<eos>", "A", " ", "B", "<eos>"],
        ["A", " ", "B", "<eos>"],
        ["A", " ", "B"],
        ["A B"],
        "A B",
    ],
)
def test_an_array_gives_its_characters_without_the_frame(tmp_path, entries):
    np.save(tmp_path / "a.npy", np.array(entries))
    assert read_texts(tmp_path) == ["A B"]


@pytest.mark.parametrize("entries", [["<sos>", "<eos>"], ["<eos>"], np.array([], "U1")])
def test_an_array_of_nothing_but_a_frame_is_an_empty_transcript(tmp_path, entries):
    np.save(tmp_path / "a.npy", np.array(entries))
    assert read_texts(tmp_path) == [""]


def test_a_folder_of_arrays_is_read_in_the_order_of_their_names(tmp_path):
    for name in "QWERTZUIOPASDFGHJKLYXCVBNM":
        np.save(tmp_path / f"{name}.npy", np.array([name]))
    assert "".join(read_texts(tmp_path)) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array(list("CAFÉ")), "b.npy: characters 'É' are outside the vocabulary (first 'É' at position 3)"),
        (np.array(["A", "<pad>"]), "b.npy: entry 1 is '<pad>', not a single character"),
        (np.array(["A", "<eos>", "B"]), "b.npy: entry 1 is '<eos>'"),
        (np.array(["A", "", "B"]), "b.npy: entry 1 is ''"),
        (np.array([1, 2]), "b.npy holds int64 of shape (2,), not a list of characters"),
        (np.array([["A"], ["B"]]), "b.npy holds <U1 of shape (2, 1)"),
        (np.array([b"A", b"B"]), "b.npy holds |S1"),
        (np.array(["A", None], object), "b.npy does not hold an array of characters (it holds values of type object"),
        (b"no array", "b.npy does not hold an array of characters"),
        (b"", "b.npy does not hold an array of characters"),
    ],
)
def test_a_bad_array_is_named(tmp_path, array, words):
    np.save(tmp_path / "a.npy", np.array(list("FINE")))
    if isinstance(array, bytes):
        (tmp_path / "b.npy").write_bytes(array)
    else:
        np.save(tmp_path / "b.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"np\.save|use only") as error:
        read_texts(tmp_path)
    assert words in str(error.value)


def test_an_archive_under_the_name_of_an_array_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", text=np.array(list("FINE")))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a.npy does not hold an array"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        ([], "none.csv", "none.csv does not exist"),
        (["a.txt"], "a.txt", "a.txt is not a CSV file"),
        ([], "", "has no .csv and no .npy file"),
        (["a.csv", "b.npy"], "", "has both .csv and .npy files"),
    ],
)
def test_a_path_without_transcripts_is_refused(tmp_path, files, path, words):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="give a") as error:
        transcripts.find_files(tmp_path / path)
    assert words in str(error.value)


def test_blank_lines_long_transcripts_and_upper_case_suffixes_are_read(tmp_path):
    long = "A" * 200_000  # above the csv module's own limit
    (tmp_path / "speech.CSV").write_text(f"id,transcript\n1,{long}\n\n2,B\n\n")
    assert read_texts(tmp_path) == [long, "B"]
    assert read_texts(tmp_path / "speech.CSV") == [long, "B"]
