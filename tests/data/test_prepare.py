"""Token shards: what they hold, that interruptions and workers change no byte, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from foreign_tokenizers import gpt2_tokenizer

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data import document_workers, documents, prepare, prepare_folder
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.prepare import prepare_corpus
from jaxlm.data.shards import check_prepared
from jaxlm.errors import CheckError

TEXTS = [f"document {i}: {'to be, or not to be, ' * (i % 5)}<|endoftext|> that is the question\n" for i in range(40)]
LONG = "whether 'tis nobler in the mind to suffer " * 9


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two files of many documents and one of a long document, which is cut into pieces."""
    monkeypatch.setattr(documents, "PIECE", 50)
    monkeypatch.setattr(document_workers, "BLOCK_CHARS", 200)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, part in (("a.jsonl", TEXTS[:25]), ("c.jsonl", TEXTS[25:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (folder / "b.txt").write_text(LONG)
    return folder


def prepared(corpus, out, workers=1, report=lambda progress: None, tokenizer=None, end_of_text=None, **fields):
    cfg = PrepareConfig(path=str(corpus), **{"bpe_vocab_size": 300, "shard_tokens": 37, **fields})
    return prepare_corpus(cfg, out, tokenizer, end_of_text, workers, report)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_are_the_documents_each_with_its_end(corpus, tmp_path):
    seen = []
    manifest = prepared(corpus, tmp_path / "out", report=seen.append)
    opened = check_prepared(tmp_path / "out")
    assert opened.manifest == manifest
    tokens = opened.tokens[: len(opened.tokens)]
    assert (tokens.dtype, manifest["dtype"], len(tokens)) == (np.uint16, "uint16", manifest["tokens"])
    ends = np.flatnonzero(tokens == opened.end_of_text)
    texts = [opened.tokenizer.decode(part) for part in np.split(tokens, ends + 1)]
    assert texts == [text + "<|endoftext|>" for text in [*TEXTS[:25], LONG, *TEXTS[25:]]] + [""]
    assert manifest["documents"] == 41 == sum(shard["documents"] for shard in manifest["shards"])
    assert [shard["tokens"] for shard in manifest["shards"][:-1]] == [37] * (len(manifest["shards"]) - 1)
    assert [source["file"] for source in manifest["sources"]] == ["a.jsonl", "b.txt", "c.jsonl"]
    assert [manifest["shards"][i]["sources"] for i in (0, -1)] == [[0, 0], [2, 2]]
    assert [0, 1] in [shard["sources"] for shard in manifest["shards"]]
    assert sorted(set(contents(tmp_path / "out"))) == sorted(
        ["manifest.json", "tokenizer.json", *(shard["file"] for shard in manifest["shards"])]
    )
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    done = [progress.bytes for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[0].total_bytes == sum(path.stat().st_size for path in corpus.iterdir())
    assert seen[-1].tokens == manifest["tokens"]


def test_a_kill_at_any_moment_costs_nothing_but_the_shard_under_way(corpus, tmp_path):
    """Each copy is what a kill at that moment leaves; a shard that is there is not written again."""
    moments = []

    def copy(progress):
        moments.append(shutil.copytree(tmp_path / "whole", tmp_path / f"moment-{len(moments)}"))

    prepared(corpus, tmp_path / "whole", report=copy)
    whole = contents(tmp_path / "whole")
    assert len(moments) > 40
    for i, folder in enumerate(moments[1::4]):
        if i % 3 == 0 and (folder / "progress.journal").stat().st_size:  # a kill while a line was being written
            journal = (folder / "progress.journal").read_bytes()
            (folder / "progress.journal").write_bytes(journal[:-9])
        done = (folder / "progress.journal").read_bytes().count(b"\n")
        kept = {path: path.stat().st_ino for path in sorted(folder.glob("shard-*"))[:done]}
        prepared(corpus, folder)
        assert contents(folder) == whole
        assert {path: path.stat().st_ino for path in kept} == kept
    folder = shutil.copytree(moments[0], tmp_path / "early")
    (folder / "tokenizer.json").unlink()  # a kill before the tokenizer was learned
    prepared(corpus, folder)
    assert contents(folder) == whole


def test_a_finished_shard_that_is_damaged_is_written_again(corpus, tmp_path):
    moments = []
    prepared(corpus, tmp_path / "whole", report=lambda progress: moments.append(copied(tmp_path, len(moments))))
    folder = next(path for path in moments if (path / "shard-00003.bin").exists())
    (folder / "shard-00001.bin").write_bytes(b"")
    prepared(corpus, folder)
    assert contents(folder) == contents(tmp_path / "whole")


def copied(tmp_path, number):
    return shutil.copytree(tmp_path / "whole", tmp_path / f"moment-{number}")


def test_workers_change_no_byte_and_one_that_is_killed_is_reported(corpus, tmp_path):
    prepared(corpus, tmp_path / "one")
    prepared(corpus, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    def kill(progress):
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(CheckError, match="a worker process was killed, perhaps for its memory: give fewer --workers"):
        prepared(corpus, tmp_path / "three", workers=2, report=kill)
    prepared(corpus, tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_other_options_and_other_files_are_refused(corpus, tmp_path):
    moments = []
    prepared(corpus, tmp_path / "whole", report=lambda progress: moments.append(copied(tmp_path, len(moments))))
    with pytest.raises(ValueError, match=r"whole is prepared already: train with --data.path"):
        prepared(corpus, tmp_path / "whole")
    out = moments[9]
    before = contents(out)
    with pytest.raises(ValueError, match=r"was begun with shard_tokens = 37, not 38: give the same options to go on"):
        prepared(corpus, out, shard_tokens=38)
    with pytest.raises(ValueError, match=r"was begun with bpe_vocab_size = 300, not None: give the same"):
        prepared(corpus, out, tokenizer=from_hugging_face(gpt2_tokenizer()), end_of_text=0)
    (corpus / "0.txt").write_text("more")
    with pytest.raises(ValueError, match=r"was begun with other files, .*: choose another --out, or delete .*moment-9"):
        prepared(corpus, out)
    (corpus / "0.txt").unlink()
    assert contents(out) == before
    with (
        prepare_folder.alone(out),
        pytest.raises(ValueError, match=r"another process works in .*: wait for it, or choose"),
    ):
        prepared(corpus, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="mine already holds something: choose another --out"):
        prepared(corpus, tmp_path / "mine")


def test_files_may_change_behind_what_is_finished_and_not_in_it(corpus, tmp_path, monkeypatch):
    """Without a change in the sample, either: with it a new corpus would have another tokenizer."""
    monkeypatch.setattr(prepare, "SAMPLE_CHARS", 60)
    mended, out = corpus / "c.jsonl", tmp_path / "out"
    (corpus / "d.txt").write_text("for who would bear the whips and scorns of time")
    good = mended.read_text()
    lines = good.splitlines(keepends=True)

    def write(*parts):
        mended.write_text("".join([*lines[:7], parts[0], *lines[7:11], parts[1], *lines[11:]]))

    bad, line = '{"text": 1}\n', '{"text": "mended"}\n'
    write(bad, bad)
    with pytest.raises(ValueError, match=r"c.jsonl, line 8 has text = 1"):
        prepared(corpus, out, val_fraction=0.001)
    kept = {path: path.stat().st_ino for path in out.glob("shard-*")}
    (out / "shard-00999.bin").write_bytes(b"of a longer corpus")
    write(line, bad)
    with pytest.raises(ValueError, match=r"c.jsonl, line 13 has text = 1"):
        prepared(corpus, out, val_fraction=0.001)
    assert len(list(out.glob("shard-*"))) > len(kept) > 20
    write(line, line)
    before = contents(out)
    for name, old, new in (
        ("b.txt", "suffer ", "SUFFER "),
        ("c.jsonl", "document 26", "document 62"),
        ("d.txt", "for who", "For who"),
    ):
        file = corpus / name
        text, stat = file.read_text(), file.stat()
        start, _, end = text.rpartition(old)
        file.write_text(start + new + end)
        with pytest.raises(ValueError, match=r"have changed since, in what is finished: choose another --out, or del"):
            prepared(corpus, out, val_fraction=0.001)
        assert contents(out) == before
        file.write_text(text)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (corpus / "e.txt").write_text("xy")
    prepared(corpus, out, val_fraction=0.001)
    prepared(corpus, tmp_path / "new", val_fraction=0.001)
    assert contents(out) == contents(tmp_path / "new")
    assert {path: path.stat().st_ino for path in kept} == kept


def test_a_folder_inside_the_corpus_is_no_part_of_it(corpus, tmp_path):
    """An interrupted call has left a plan, a journal and shards there."""
    prepared(corpus, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        prepared(corpus, corpus / "out", report=interrupt)
    assert len(prepare_folder.read_journal(corpus / "out")) == 3
    prepared(corpus, corpus / "out")
    assert contents(corpus / "out") == contents(tmp_path / "whole")


def interrupt(progress):
    if progress.shards == 3:
        raise InterruptedError


def test_before_a_shard_is_finished_any_file_may_change(corpus, tmp_path):
    (corpus / "c.jsonl").write_text('{"text": "one"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"c.jsonl, line 2 has text = 1"):
        prepared(corpus, tmp_path / "out", shard_tokens=100_000)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    (corpus / "a.jsonl").write_text('{"text": "another beginning"}\n')
    (corpus / "c.jsonl").unlink()
    prepared(corpus, tmp_path / "out", shard_tokens=100_000)
    prepared(corpus, tmp_path / "new", shard_tokens=100_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("plan", [b"{}", b"[]", b"{", b"\xff", b'{"format": "jaxlm-tokens-1"}', b'{"format": 1}'])
def test_a_plan_that_is_not_ours_is_left_alone(corpus, tmp_path, plan):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_bytes(plan)
    with pytest.raises(ValueError, match=r"out already holds something: choose another --out"):
        prepared(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == {"plan.json": plan}


def test_a_damaged_line_ends_the_journal(corpus, tmp_path):
    moments = []
    prepared(corpus, tmp_path / "whole", report=lambda progress: moments.append(copied(tmp_path, len(moments))))
    whole = contents(tmp_path / "whole")
    out = next(path for path in moments if (path / "shard-00005.bin").exists())
    journal = (out / "progress.journal").read_bytes().splitlines(keepends=True)
    entry = json.loads(journal[2])
    wrong = [{**entry, "next": ["x", 0, 0, 0, ""]}, {**entry, "next": [0]}, {**entry, "shard": {"file": "../x"}}, 5]
    for damaged in (b"\xff\x00", b"{", b"", *(json.dumps(line).encode() for line in wrong)):
        folder = shutil.copytree(out, tmp_path / "damaged")
        (folder / "progress.journal").write_bytes(b"".join([*journal[:2], damaged + b"\n", *journal[3:]]))
        kept = {path: path.stat().st_ino for path in sorted(folder.glob("shard-*"))[:2]}
        assert len(prepare_folder.read_journal(folder)) == 2
        prepared(corpus, folder)
        assert contents(folder) == whole
        assert {path: path.stat().st_ino for path in kept} == kept
        shutil.rmtree(folder)


def test_a_damaged_tokenizer_of_unfinished_work_is_named(corpus, tmp_path):
    moments = []
    prepared(corpus, tmp_path / "whole", report=lambda progress: moments.append(copied(tmp_path, len(moments))))
    (moments[5] / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read as JSON .*: delete .*moment-5, and prepare"):
        prepared(corpus, moments[5])


def test_a_full_disk_is_named_and_what_is_finished_is_kept(corpus, tmp_path, monkeypatch):
    prepared(corpus, tmp_path / "whole")
    with monkeypatch.context() as full:
        finished = []
        partial = property(lambda shards: Path("/dev/full") if len(shards.entries) == 3 else shards._out / ".part")
        full.setattr(prepare_folder.ShardWriter, "_partial", partial)
        full.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(
            ValueError, match=r"cannot be written \(No space left on device\): free some space, and give"
        ):
            prepared(corpus, tmp_path / "out", report=finished.append)
    assert finished[-1].shards == 3
    prepared(corpus, tmp_path / "out")
    (tmp_path / "out" / ".part").unlink(missing_ok=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_corpus_that_no_split_suits_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for words in ("holds no text", "is one document, and training and validation share none: give more files"):
        with pytest.raises(ValueError, match=words):
            prepared(tmp_path / "*.txt", tmp_path / "out")
        (tmp_path / "a.txt").write_text("one\n")
    assert not (tmp_path / "out").exists()


def test_a_new_tokenizer_learns_from_documents_for_training_alone_and_from_a_bounded_part(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 50)
    for i, letters in enumerate(["ab", "cd", "ef", "gh"]):
        lines = [json.dumps({"text": f"{letters} " * 10}) for _ in range(20)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    cfg = PrepareConfig(path=str(tmp_path), val_fraction=0.375)
    sources = documents.find_sources(cfg)
    learned = "".join(prepare._sample(sources, cfg))
    assert [learned.count(letters) for letters in ("ab", "cd", "ef", "gh")] == [200, 200, 100, 0]
    monkeypatch.setattr(prepare, "SAMPLE_CHARS", 250)
    learned = "".join(prepare._sample(sources, cfg))
    assert [learned.count(letters) for letters in ("ab", "cd", "ef", "gh")] == [30, 30, 30, 0]
    monkeypatch.setattr(prepare, "SAMPLE_FILES", 1)
    learned = "".join(prepare._sample(sources, cfg))
    assert [learned.count(letters) for letters in ("ab", "cd", "ef", "gh")] == [90, 0, 0, 0]


def test_an_existing_tokenizer_is_kept_and_a_large_vocabulary_takes_four_bytes(corpus, tmp_path):
    data = gpt2_tokenizer()
    data["model"]["vocab"]["unused"] = 70_000
    tokenizer = from_hugging_face(data)
    with pytest.raises(ValueError, match="end_of_text = 70001 is no special token of the tokenizer: give one of 0"):
        prepared(corpus, tmp_path / "out", tokenizer=tokenizer, end_of_text=70_001)
    manifest = prepared(corpus, tmp_path / "out", tokenizer=tokenizer, end_of_text=0)
    opened = check_prepared(tmp_path / "out")
    assert (manifest["dtype"], manifest["vocab_size"], opened.end_of_text) == ("uint32", 70_001, 0)
    assert opened.tokenizer.to_dict() == tokenizer.to_dict()
    tokens = opened.tokens[: len(opened.tokens)]
    assert (tokens == 0).sum() == 41
    assert opened.tokenizer.decode(tokens[:10]).startswith("document 0")


@pytest.mark.slow
def test_after_sigkill_no_worker_is_left_and_the_result_is_the_same(tmp_path):
    lines = [json.dumps({"text": text * 40}) for text in TEXTS * 20]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = ["--data.path", "a.jsonl", "--data.bpe-vocab-size", "300", "--shard-tokens", "50000", "--workers", "2"]
    command = [sys.executable, "-m", "jaxlm", "prepare", *options, "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    process = subprocess.Popen([*command, "out"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "out" / "shard-00001.bin").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)  # the pipe ends when the workers are gone, which have it too
    assert not (tmp_path / "out" / "manifest.json").exists()
    subprocess.run([*command, "out"], cwd=tmp_path, check=True, capture_output=True, env={**os.environ})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
