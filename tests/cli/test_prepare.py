"""`jaxlm prepare` with documents of one's own: what it says, what it refuses, and that training reads the result."""

import dataclasses
import json
import os
import signal

import pytest
from foreign_tokenizers import gpt2_tokenizer
from support import command, refused, snapshot

from jaxlm.cli.prepare import _Bar
from jaxlm.data.corpus import load_corpus
from jaxlm.data.shards import open_prepared
from jaxlm.run.folder import load_run, read_config
from jaxlm.training.evaluate import Evaluation

TRAIN = ["train", "tiny", "--model.family", "bigram", "--optim.warmup-steps", "1", "--train.steps", "3"]
PREPARE = ["prepare", "--data.path", "corpus", "--data.bpe-vocab-size", "300", "--shard-tokens", "1000"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with a corpus of two files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in "ab":
        texts = [f"{name} {i}: to be, or not to be, that is the question\n" for i in range(50)]
        lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts)
        (tmp_path / "corpus" / f"{name}.jsonl").write_text(lines)
    return tmp_path


def test_a_corpus_is_prepared_checked_trained_on_evaluated_and_moved(work):
    code, out, err = command(*PREPARE, "--out", "tokens", "--workers", "1")
    assert code == 0, err
    opened = open_prepared(work / "tokens")
    total, size = len(opened.tokens), opened.tokenizer.vocab_size
    assert (
        out == f"tokens: {total:,} tokens of 100 documents in {-(-total // 1000)} shards (uint16), vocabulary {size}\n"
    )
    assert err == "train: jaxlm train --data.path tokens\n"
    code, out, _ = command("prepare", "--check", "tokens", "--json")
    assert (code, json.loads(out)["tokens"]) == (0, total)
    code, out, err = command(*TRAIN, "--data.path", "tokens", "--data.val-fraction", "0.2", "--out", "run")
    assert code == 0, err
    run = load_run("run")
    assert (run.corpus_sha256, run.model.cfg.vocab_size) == (opened.sha256, size)
    assert (run.config.data.tokenizer, run.config.data.path) == ("bpe", str(work / "tokens"))
    (work / "tokens").rename(work / "moved")
    code, out, err = command("eval", "run", "--data.path", "moved", "--json")
    assert code == 0, err
    boundary = opened.boundary(0.2)
    assert json.loads(out)["val_targets"] == total - boundary - 1
    code, _, err = command(
        "train", "--resume", "--out", "run", "--train.steps", "4", "--data.path", "moved", "--optim.keep-schedule"
    )
    assert (code, read_config(work / "run").train.steps) == (0, 4), err
    code, _, err = command(*TRAIN, "--init-from", "run", "--data.path", "moved", "--out", "second")
    assert code == 0, err
    shard = work / "moved" / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    code, out, err = command("prepare", "--check", "moved")
    assert (code, out) == (1, "")
    assert err.startswith("jaxlm: error: moved/shard-00001.bin is damaged: its sha256 is ")


def test_training_and_evaluation_keep_attention_inside_documents(work):
    assert command(*PREPARE, "--out", "tokens", "--workers", "1")[0] == 0
    sizes = ["--model.num-layers", "1", "--model.embed-dim", "8", "--model.num-heads", "1", "--model.position", "none"]
    options = [*sizes, "--train.steps", "2", "--optim.warmup-steps", "1", "--sample.max-new-tokens", "2"]
    losses = {}
    for pack in ("documents", "stream"):
        where = ["--data.path", "tokens", "--data.pack", pack, "--out", pack]
        code, _, err = command("train", "tiny", *options, *where)
        assert code == 0, err
        losses[pack] = [json.loads(line) for line in (work / pack / "metrics.jsonl").read_text().splitlines()]
    first, second = ([row["loss"] for row in rows if "loss" in row] for rows in losses.values())
    assert first[0] != second[0]  # the same weights and windows
    code, out, err = command("eval", "documents", "--json")
    assert code == 0, err
    assert json.loads(out)["val_loss"] == pytest.approx(losses["documents"][-1]["val_loss"], rel=1e-6)
    run = load_run("documents")
    data = dataclasses.replace(run.config.data, pack="stream")
    corpus = load_corpus(data, run.model.cfg.max_seq_len)
    of_stream = Evaluation(run.model, corpus, dataclasses.replace(run.config, data=data))(run.params)["val_loss"]
    assert abs(of_stream - json.loads(out)["val_loss"]) > 1e-7


def test_a_tokenizer_of_another_folder_is_taken(work):
    (work / "foreign").mkdir()
    (work / "foreign" / "tokenizer.json").write_text(json.dumps(gpt2_tokenizer()))
    for source, out in (("foreign", "first"), ("first", "second")):
        options = ["--data.path", "corpus", "--tokenizer-from", source, "--out", out, "--workers", "1"]
        assert command("prepare", *options)[0] == 0
    assert (work / "first" / "tokenizer.json").read_bytes() == (work / "second" / "tokenizer.json").read_bytes()
    assert "<|endoftext|>" in (work / "second" / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare"], "DATASET is missing (or --data.path, or --check); see jaxlm prepare --help"),
        (["prepare", "tinyshakespeare", "--out", "x"], "--out does not go together with DATASET: leave it out"),
        (["prepare", "--check", "corpus", "--workers", "2"], "--workers does not go together with --check: leave"),
        (["prepare", "--check", "corpus"], "corpus is not a prepared corpus, or not finished"),
        (PREPARE, "--data.path corpus needs a folder for the shards: give --out DIR"),
        (
            [*PREPARE, "--out", "x", "--tokenizer-from", "corpus"],
            "--data.bpe-vocab-size does not go together with --to",
        ),
        (["prepare", "--data.path", "corpus", "--out", "x", "--tokenizer-from", "corpus"], "tokenizer.json cannot be"),
        ([*PREPARE, "--out", "x", "--workers", "0"], "workers = 0 is too small: give at least 1"),
        ([*PREPARE, "--out", "x", "--shard-tokens", "0"], "shard_tokens = 0 is too small"),
        ([*PREPARE, "--out", "x", "--data.tokenizer", "char"], "invalid choice 'char' for argument '--data.tokenizer'"),
        (
            [*PREPARE, "--out", "x", "--field", "body"],
            "corpus/a.jsonl, line 1 has no field 'body': name one of text, n",
        ),
        ([*PREPARE, "--out", "x", "--field", "n"], "corpus/a.jsonl, line 1 has n = 1: give a text there"),
        ([*PREPARE, "--out", "x", "--data.val-fraction", "1"], "val_fraction = 1.0 is out of range"),
        ([*PREPARE, "--out", "corpus"], "corpus already holds something: choose another --out"),
        (["prepare", "--data.path", "none", "--out", "x"], "corpus none: there is no such file or folder"),
        (
            [*TRAIN, "--data.path", "corpus", "--data.pack", "documents"],
            "data.pack = 'documents' is for attention, which family = 'bigram' has not: use 'stream'",
        ),
        (
            [
                "train",
                "tiny",
                "--data.pack",
                "documents",
                "--model.attention-impl",
                "cudnn",
                "--model.dtype",
                "bfloat16",
            ],
            "data.pack = 'documents' has no mask in attention_impl = 'cudnn': use 'auto'",
        ),
        (
            ["train", "tiny", "--data.path", "corpus/a.jsonl", "--data.pack", "documents"],
            "data.pack = 'documents' needs documents: prepare them by jaxlm prepare, and give its",
        ),
        (["train", "tiny", "--data.path", "gone", "--data.pack", "documents"], "gone does not exist: give an existing"),
        (["train", "tiny", "--data.path", "gone"], "gone does not exist: give an existing"),
        (["train", "tiny", "--data.path", ""], "data.path = '' names nothing: give a path, or leave it out"),
        (["prepare", "--data.path", "", "--out", "x"], "data.path = '' names nothing: give a file, a folder or a"),
        ([*PREPARE, "--out", "corpus/a.jsonl/x"], "cannot be written (Not a directory): choose another --out"),
        ([*TRAIN, "--data.path", "begun"], "begun is not a prepared corpus, or not finished: give its `jaxlm prepare`"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_changes_nothing(work, arguments, words):
    (work / "begun").mkdir()
    (work / "begun" / "plan.json").write_text("{}")
    before = snapshot(work)
    assert words in refused(*arguments)
    assert snapshot(work) == before


def test_a_file_that_turns_out_bad_leaves_what_is_finished_to_go_on_from(work):
    content = (work / "corpus" / "b.jsonl").read_bytes()
    (work / "corpus" / "b.jsonl").write_bytes(content + b'\n{"text": \n')
    options = [*PREPARE, "--out", "tokens", "--workers", "1"]
    for _ in range(2):
        assert "corpus/b.jsonl, line 51 is not JSON (Expecting value): correct or remove it" in refused(*options)
    assert (work / "tokens" / "shard-00000.bin").exists()
    assert not list((work / "tokens").glob(".*"))
    (work / "corpus" / "b.jsonl").write_bytes(content)
    shard = (work / "tokens" / "shard-00000.bin").stat().st_ino
    assert command(*options)[0] == 0
    assert (work / "tokens" / "shard-00000.bin").stat().st_ino == shard


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_that_the_same_command_goes_on(work, monkeypatch, signum):
    whole = [*PREPARE, "--out", "whole", "--workers", "1"]
    assert command(*whole)[0] == 0
    before = signal.getsignal(signum)
    monkeypatch.setattr(_Bar, "show", lambda bar, progress: progress.shards == 2 and os.kill(os.getpid(), signum))
    if signum == signal.SIGINT:
        monkeypatch.setattr(signal, "getsignal", lambda signum: signal.default_int_handler)  # a shell's & ignores it
    code, out, err = command(*PREPARE, "--out", "tokens", "--workers", "1")
    monkeypatch.undo()
    signal.signal(signum, before)
    assert (code, out) == (128 + signum, "")
    assert err == "stopped: the same command goes on; finished shards are kept\n"
    assert not list((work / "tokens").glob("*.partial")) + list((work / "tokens").glob(".*"))
    monkeypatch.chdir(work)
    assert command(*PREPARE, "--out", "tokens", "--workers", "1")[0] == 0
    assert {file.name: file.read_bytes() for file in (work / "tokens").iterdir()} == {
        file.name: file.read_bytes() for file in (work / "whole").iterdir()
    }


def test_training_names_a_shard_with_an_id_outside_the_vocabulary(work):
    assert command(*PREPARE, "--out", "tokens", "--workers", "1")[0] == 0
    shard = work / "tokens" / "shard-00000.bin"
    shard.write_bytes(b"\xff\xee" * (shard.stat().st_size // 2))
    code, _, err = command(*TRAIN, "--data.path", "tokens", "--out", "run")
    assert code == 1
    assert "the id 61183, and the vocabulary ends with " in err.splitlines()[-1]
    assert f"`jaxlm prepare --check {work / 'tokens'}` names the file" in err.splitlines()[-1]
