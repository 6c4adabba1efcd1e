"""Runs on all that data.path takes: begun, continued where the data have moved, evaluated, and refused for others."""

import dataclasses
import gzip
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from foreign_tokenizers import llama2_tokenizer
from support import command, refused

from jaxlm.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import CharTokenizer, prompt_ids
from jaxlm.errors import UserError
from jaxlm.run.folder import Run, read_config
from jaxlm.run.session import new_session, resumed_session

MODEL = ModelConfig(vocab_size=65, family="bigram", max_seq_len=8)
TEXT = "the cat sat on the mat; the dog sat on the log\n" * 12
OTHER_DATA = "the data are not those of the run: their sha256 is"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "val.txt").write_text("a cat, a mat\n" * 9)


def config(**data):
    optim, train = OptimConfig(warmup_steps=0), TrainConfig(steps=2, batch_size=2)
    return ExperimentConfig(preset="tiny", model=MODEL, data=DataConfig(**data), optim=optim, train=train)


def begin(folder, **data):
    """A run that was stopped before its first step."""
    return new_session(config(**data), folder)


def go_on(folder, **data):
    stored = read_config(folder)
    return resumed_session(dataclasses.replace(stored, data=dataclasses.replace(stored.data, **data)), folder)


def stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode()), closed=False))


def test_several_files_and_a_held_out_text_are_known_again_wherever_they_are(tmp_path):
    rows = [{"story": "a log\n"}, {"story": "a dog"}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    begun = begin(tmp_path / "run", path=("a.txt", "b.jsonl.gz"), val_path="val.txt", field="story")
    assert begun.corpus.tokenizer.chars == "".join(sorted({*TEXT, *"a cat, a mat\n"}))
    assert read_config(tmp_path / "run").data.path == ("a.txt", "b.jsonl.gz")
    (tmp_path / "moved").mkdir()
    for name in ("a.txt", "b.jsonl.gz", "val.txt"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with pytest.raises(UserError, match=r"corpus a.txt does not exist"):
        go_on(tmp_path / "run")
    (tmp_path / "moved/val.txt").rename(tmp_path / "val")
    # A folder of the same files in the same order is the same text.
    session = go_on(tmp_path / "run", path="moved", val_path="val")
    np.testing.assert_array_equal(session.corpus.train.tokens, begun.corpus.train.tokens)
    with pytest.raises(UserError, match=OTHER_DATA):
        go_on(tmp_path / "run", val_path=None)


def test_a_tokenizer_file_is_that_of_the_run_and_no_other_goes_on(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama2_tokenizer()))
    (tmp_path / "other.json").write_text(json.dumps(CharTokenizer(TEXT).to_dict()))
    session = begin(tmp_path / "run", path="a.txt", tokenizer="tokenizer.json")
    foreign = from_hugging_face(llama2_tokenizer())
    assert (session.corpus.tokenizer.to_dict(), session.config.data.tokenizer) == (foreign.to_dict(), "bpe")
    assert session.config.model.vocab_size == foreign.vocab_size
    # It puts <s> in front of a text and </s> behind it; a prompt is to go on, so it has no end.
    assert (session.corpus.train.tokens[0], session.corpus.train.tokens[-1]) == (1, 2)
    prompt = prompt_ids("the cat", session.corpus.tokenizer).tolist()
    assert (prompt[0], prompt.count(2)) == (1, 0)
    go_on(tmp_path / "run", tokenizer="./tokenizer.json")
    with pytest.raises(UserError, match=r"names another tokenizer than that of .*run, which stays: leave it out"):
        go_on(tmp_path / "run", tokenizer="other.json")
    run = Run(tmp_path / "run", session.config, session.model, session.state.params, foreign, 0, None)
    new_session(config(path="a.txt", tokenizer="./tokenizer.json"), tmp_path / "next", init_from=run)
    with pytest.raises(UserError, match=r"names another tokenizer than that of .*run, which stays: leave it out"):
        new_session(config(path="a.txt", tokenizer="other.json"), tmp_path / "third", init_from=run)


def test_a_folder_of_nanogpt_is_known_again(tmp_path):
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(c) for c in TEXT], np.uint16)
    (tmp_path / "bins").mkdir()
    ids[:500].tofile(tmp_path / "bins/train.bin")
    ids[500:].tofile(tmp_path / "bins/val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    (tmp_path / "bins/meta.json").write_text(json.dumps(meta))
    begin(tmp_path / "run", path="bins")
    (tmp_path / "bins").rename(tmp_path / "moved")
    session = go_on(tmp_path / "run", path="moved")
    assert session.corpus.tokenizer.decode(session.corpus.val.tokens[:]) == TEXT[500:]
    ids[:40].tofile(tmp_path / "moved/val.bin")
    with pytest.raises(UserError, match=OTHER_DATA):
        go_on(tmp_path / "run", path="moved")


def test_the_command_trains_on_stdin_goes_on_and_evaluates_and_refuses_other_data_first(tmp_path, monkeypatch):
    small = ["--model.family", "bigram", "--train.steps", 2, "--optim.warmup-steps", 0, "--sample.max-new-tokens", 3]
    stdin(monkeypatch)
    code, _, err = command("train", "tiny", *small, "--data.path", "val.txt", "--data.path", "-", "--out", "run")
    assert code == 0, err
    data = read_config(tmp_path / "run").data
    assert data.path[0] == str(tmp_path / "val.txt")
    assert data.path[1].startswith(str(tmp_path / "cache/stdin"))
    assert resumed_session(read_config(tmp_path / "run"), tmp_path / "run").saved_step == 2
    stdin(monkeypatch)
    both = command("eval", "run", "run", "--data.path", "val.txt", "--data.path", "-", "--json")[1]
    assert [result["split"] for result in json.loads(both)["runs"]] == ["validation"] * 2
    other = json.loads(command("eval", "run", "--data.path", "a.txt", "--json")[1])
    assert (other["split"], other["targets"]) == ("all", len(TEXT) - 1)
    (tmp_path / "b.txt").write_text("été\n" * 99)  # with a character that the run does not know
    assert OTHER_DATA in refused("train", "--resume", "--out", "run", "--data.path", "b.txt")
    (tmp_path / "b.txt").rename(tmp_path / "val.txt")
    for asked in ([], ["--task", "prediction"]):
        assert OTHER_DATA in refused("eval", "run", *asked)
