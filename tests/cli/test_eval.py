"""`jaxlm eval`: the run's own data, another text, several runs."""

import contextlib
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from support import apply, command

from jaxlm.data.files import sealed
from jaxlm.run.folder import load_run

RUN = ["train", "tiny", "--train.steps", "30", "--train.eval-every", "15", "--train.checkpoint-every", "15"]
SMALL = ["--model.num-layers", "1", "--optim.warmup-steps", "2", "--sample.max-new-tokens", "20"]
OTHER = "O Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name;\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shakespeare):
    """A working folder with a text, another one, and runs/tiny-1 and runs/tiny-2 of two tokenizers, trained once."""
    root = tmp_path_factory.mktemp("work")
    (root / "text.txt").write_text(shakespeare.read_text()[:30_000])
    (root / "other.txt").write_text(OTHER)
    bpe = ["--data.tokenizer", "bpe", "--data.bpe-vocab-size", "300", "--model.vocab-size", "300"]
    with contextlib.chdir(root):
        for more in ([], bpe):
            code, _, err = command(*RUN, *SMALL, *more, "--data.path", "text.txt")
            assert code == 0, err
    return root


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def measured(*arguments):
    code, out, err = command("eval", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_eval_repeats_the_losses_that_training_logged(folder):
    code, out, _ = command("eval", "runs/tiny-1", "--step", "15", "--json")
    assert code == 0
    found = json.loads(out)
    rows = [json.loads(line) for line in (folder / "runs/tiny-1/metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in rows if "val_loss" in row and row["step"] == 15)
    for name in ("val_loss", "train_loss", "perplexity"):
        assert found[name] == logged[name]
    assert found["val_targets"] == 3000 - 1


def test_eval_finds_a_text_that_moved(folder):
    shutil.move("text.txt", "moved.txt")
    try:
        assert "text.txt does not exist" in refused("runs/tiny-1")
        assert command("eval", "runs/tiny-1", "--data.path", "moved.txt")[0] == 0
    finally:
        shutil.move("moved.txt", "text.txt")


def refused(*arguments):
    """The one line of a refusal."""
    code, out, err = command("eval", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_the_runs_own_losses_say_where_they_come_from_and_have_bits_per_byte(folder):
    result = measured("runs/tiny-1")
    assert (result["data"], result["split"]) == (str(folder / "text.txt"), "validation")
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))  # ASCII: a byte a character
    code, out, _ = command("eval", "runs/tiny-1")
    assert code == 0
    for words in ("bits_per_byte", "perplexity", "validation", f"{result['val_loss']:.6g}"):
        assert words in out


@pytest.mark.parametrize("number", [1, 2])
def test_another_text_is_evaluated_as_a_whole(folder, number):
    result = measured(f"runs/tiny-{number}", "--data.path", "other.txt")
    assert (result["data"], result["split"]) == (str(folder / "other.txt"), "all")
    run = load_run(f"runs/tiny-{number}")
    ids, losses = run.tokenizer.encode(OTHER), []
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        logits = np.asarray(apply(run.model, run.params, jnp.asarray(window[None, :-1]))[0][0], np.float64)
        losses += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(window) - 1), window[1:]])
    assert result["targets"] == len(losses) == len(ids) - 1
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["perplexity"] == math.exp(result["loss"])
    text_bytes = len(run.tokenizer.decode(ids[1:]).encode())
    assert result["bits_per_byte"] == pytest.approx(np.sum(losses) / math.log(2) / text_bytes, rel=1e-5)


def test_characters_beyond_one_byte_count_as_the_bytes_they_have(folder):
    (folder / "long.txt").write_text("wherefore — né?\n" * 9)
    result = measured("runs/tiny-2", "--data.path", "long.txt")
    text_bytes = len(("wherefore — né?\n" * 9).encode()) - 1  # but the first token, a byte
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["targets"] / math.log(2) / text_bytes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Zoë", "strange.txt: characters 'Zë' are outside the vocabulary (first 'Z' at position 0)"),
        ("", "strange.txt has 0 tokens, too few for one target: give a longer one"),
        ("a", "strange.txt has 1 tokens, too few for one target: give a longer one"),
        (b"\xff", "strange.txt is not UTF-8: byte 0xff at offset 0"),
        (None, "strange.txt does not exist"),
    ],
)
def test_a_text_that_cannot_be_evaluated_is_named(folder, content, words):
    (folder / "strange.txt").unlink(missing_ok=True)
    if content is not None:
        (folder / "strange.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused("runs/tiny-1", "--data.path", "strange.txt")


def test_other_data_of_the_run_itself_are_refused_without_a_path(folder):
    shutil.copytree("runs/tiny-1", "changed")
    record = json.loads((folder / "changed/config.json").read_text())
    (folder / "changed/config.json").write_text(json.dumps(sealed({**record, "corpus_sha256": "ab" * 32})))
    assert "the data are not those of the run" in refused("changed")
    assert measured("changed", "--data.path", "text.txt")["split"] == "all"
    shutil.rmtree("changed")


def test_several_runs_are_one_table_and_a_list(folder):
    results = measured("runs/tiny-1", "runs/tiny-2")["runs"]
    assert results == [measured("runs/tiny-1"), measured("runs/tiny-2")]
    assert results[0]["bits_per_byte"] != results[1]["bits_per_byte"]
    code, out, _ = command("eval", "runs/tiny-1", "runs/tiny-2", "--data.path", "other.txt")
    assert code == 0
    assert out.count("bits_per_byte") == 1
    for result in measured("runs/tiny-1", "runs/tiny-2", "--data.path", "other.txt")["runs"]:
        (line,) = [line for line in out.splitlines() if result["run"] in line]
        assert f"{result['loss']:.6g}" in line
        assert f"{result['bits_per_byte']:.6g}" in line
    assert "nothing is not a run" in refused("runs/tiny-1", "nothing")
