"""Transcripts: how files become rows, what is refused, and a run on them by the command."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import apply, command

from jaxlm.data import transcripts
from jaxlm.data.batches import batch_starts
from jaxlm.data.corpus import load_corpus
from jaxlm.data.tokenizer import TranscriptTokenizer
from jaxlm.model.build import init_params
from jaxlm.run.folder import load_run
from jaxlm.run.hooks import Recorder
from jaxlm.training.step import StepMetrics

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
        ("id,transcript\n1,A\n2,B,C\n", "a.csv row 3: 3 columns in place of 2"),
        ("id,transcript\n1\n", "a.csv row 2: 1 columns in place of 2"),
        ('id,transcript\n1,A\n2,"B\n', "a.csv row 3: no CSV (unexpected end of data)"),
        ("", "a.csv is empty"),
        ("id,transcript\n1,CAF\udcc9\n", "a.csv is not UTF-8: byte 0xc9 at offset 19, line 2"),
    ],
)
def test_a_bad_table_is_named_with_its_row(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="write|use only|convert|begin|mend") as error:
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
        (np.array(["A", "<pad>"]), "b.npy: entry 1 is '<pad>', no single character"),
        (np.array(["A", "<eos>", "B"]), "b.npy: entry 1 is '<eos>'"),
        (np.array(["A", "", "B"]), "b.npy: entry 1 is ''"),
        (np.array([1, 2]), "b.npy holds int64 of shape (2,), no list of characters"),
        (np.array([["A"], ["B"]]), "b.npy holds <U1 of shape (2, 1)"),
        (np.array([b"A", b"B"]), "b.npy holds |S1"),
        (np.array(["A", None], object), "b.npy holds no array of characters (Object arrays cannot be loaded"),
        (b"no array", "b.npy holds no array of characters"),
        (b"", "b.npy holds no array of characters"),
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
    with pytest.raises(ValueError, match=r"a.npy holds an archive"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        ([], "none.csv", "none.csv is not there"),
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


# A run ---------------------------------------------------------------------------------------------------------------

TRAIN = ["train", "tiny", "--data.tokenizer", "transcript", "--data.path", "train.csv", "--data.val-path", "val.csv"]
SMALL = ["--model.num-layers", "1", "--model.max-seq-len", "16", "--optim.warmup-steps", "2", "--optim.learning-rate"]
STEPS = ["0.02", "--train.steps", "40", "--train.eval-every", "20", "--train.checkpoint-every", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with transcripts of its own and runs/tiny-1, trained once."""
    root = tmp_path_factory.mktemp("work")
    words = ["YES", "NO", "NEVER MORE", "", "A LONG ONE THAT TAKES TWO ROWS"]
    for name, count in (("train", 50), ("val", 11)):
        rows = [f"{i},{words[i % 5]}\n" for i in range(count)]
        (root / f"{name}.csv").write_text("id,transcript\n" + "".join(rows))
    with contextlib.chdir(root):
        code, out, err = command(*TRAIN, *SMALL, *STEPS)
    assert code == 0, err
    assert "runs/tiny-1 (step 40" in err
    assert "<eos>" not in out
    return root


@pytest.fixture(autouse=True)
def inside(request, monkeypatch):
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("elapsed_s", "tokens_per_s")} for line in lines]


def test_a_run_knows_its_transcripts_and_samples_from_nothing(folder):
    config = json.loads((folder / "runs/tiny-1/config.json").read_text())["config"]
    assert config["data"]["val_path"] == str(folder / "val.csv")
    assert config["model"]["vocab_size"] == 30
    assert config["sample"]["prompt"] == ""
    assert json.loads((folder / "runs/tiny-1/tokenizer.json").read_text()) == {"type": "transcript"}


def mean_loss(model, params, rows):
    """Mean over the targets that are no padding, in numpy."""
    rows = np.asarray(rows, np.int32)
    logits = np.asarray(apply(model, params, jnp.asarray(rows[:, :-1]))[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
    return losses[rows[:, 1:] != 29].mean()


def test_the_losses_of_a_run_are_means_over_real_targets(folder):
    trained = load_run("runs/tiny-1", 40)
    corpus = load_corpus(trained.config.data, seq_len=16)
    first, last = (rows_of(folder / "runs/tiny-1")[i] for i in (0, -1))
    assert last["val_loss"] == pytest.approx(mean_loss(trained.model, trained.params, corpus.val), rel=1e-5)
    slice_loss = mean_loss(trained.model, trained.params, corpus.train[: len(corpus.val)])
    assert last["train_loss"] == pytest.approx(slice_loss, rel=1e-5)
    batch = corpus.train[np.asarray(batch_starts(0, 0, trained.config.train.batch_size, len(corpus.train)))]
    untrained = init_params(trained.model, jax.random.key(0))
    assert first["loss"] == pytest.approx(mean_loss(trained.model, untrained, batch), rel=1e-5)


def test_the_logged_speed_counts_real_targets(folder, tmp_path):
    trained = load_run("runs/tiny-1")
    corpus = load_corpus(trained.config.data, seq_len=16)
    kept = Recorder(tmp_path, trained.config, trained.model, corpus, None, [])
    kept.report(
        StepMetrics(jnp.int32(10), jnp.float32(1), jnp.float32(1), jnp.int32(0), jnp.bool_(False)), steps=6, seconds=0.5
    )
    kept.close()
    targets_a_row = 10 * (4 + 3 + 11 + 1 + 31) / 60  # 50 utterances, of which 10 take two rows
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["tokens_per_s"] == pytest.approx(6 * 8 * targets_a_row / 0.5, abs=0.1)


def test_evaluation_repeats_the_logged_loss_over_every_target(folder):
    code, out, _ = command("eval", "runs/tiny-1", "--step", "40", "--json")
    assert code == 0
    found, logged = json.loads(out), rows_of(folder / "runs/tiny-1")[-1]
    assert {name: found[name] for name in ("val_loss", "train_loss")} == {
        name: logged[name] for name in ("val_loss", "train_loss")
    }
    assert found["val_targets"] == 2 * (4 + 3 + 11 + 1 + 31) + 4


def test_evaluation_finds_held_out_transcripts_that_moved_and_refuses_others(folder):
    (folder / "val.csv").rename(folder / "moved.csv")
    try:
        assert "val.csv is not there" in command("eval", "runs/tiny-1")[2]
        assert command("eval", "runs/tiny-1", "--data.val-path", "moved.csv")[0] == 0
        code, _, err = command("eval", "runs/tiny-1", "--data.val-path", "train.csv")
        assert (code, "the text has changed" in err) == (2, True)
    finally:
        (folder / "moved.csv").rename(folder / "val.csv")


def test_samples_begin_after_an_eos_and_end_before_the_next(folder):
    draw = ["sample", "runs/tiny-1", "--max-new-tokens", "13", "--num-samples", "12", "--json"]
    texts = json.loads(command(*draw)[1])["texts"]
    assert len({len(text) for text in texts}) > 1
    assert any(text in ("YES", "NO", "") for text in texts)
    assert not any("<eos>" in text or "\n" in text for text in texts)
    assert all(text.startswith("NEV") for text in json.loads(command(*draw, "--prompt", "NEV")[1])["texts"])
    code, _, err = command("sample", "runs/tiny-1", "--prompt", "never")
    assert (code, "write letters in upper case" in err) == (2, True)


def test_a_stopped_run_resumes_to_the_same_bits(folder):
    first = ["--out", "stopped", "--train.max-minutes", "0"]
    assert command(*TRAIN, *SMALL, *STEPS, *first)[0] == 0
    assert rows_of(folder / "stopped") == []
    (folder / "val.csv").rename(folder / "moved.csv")
    resume = ["train", "--resume", "--out", "stopped", "--train.max-minutes", "None", "--data.val-path", "moved.csv"]
    code, _, err = command(*resume)
    (folder / "moved.csv").rename(folder / "val.csv")
    assert code == 0, err
    assert rows_of(folder / "stopped") == rows_of(folder / "runs/tiny-1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.path", "bad.csv"], "bad.csv row 3: characters 'é' are outside the vocabulary (first 'é' at"),
        (["--data.val-path", "bad.csv"], "bad.csv row 3: characters 'é' are outside"),
        (["--data.path", "none.csv"], "none.csv is not there"),
        (["--data.tokenizer", "char"], "is for tokenizer = 'transcript', not 'char'"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, words):
    (folder / "bad.csv").write_text("id,transcript\n1,FINE\n2,CAFé\n")
    code, out, err = command(*TRAIN, *SMALL, *STEPS, "--out", "refused", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (folder / "refused").exists()


def test_blank_lines_long_transcripts_and_upper_case_suffixes_are_read(tmp_path):
    long = "A" * 200_000  # above the csv module's own limit
    (tmp_path / "speech.CSV").write_text(f"id,transcript\n1,{long}\n\n2,B\n\n")
    assert read_texts(tmp_path) == [long, "B"]
    assert read_texts(tmp_path / "speech.CSV") == [long, "B"]
