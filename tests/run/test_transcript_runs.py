"""A run on speech transcripts, from training to samples."""

import contextlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import apply, command

from jaxlm.data.batches import batch_starts
from jaxlm.data.corpus import load_corpus
from jaxlm.model.build import init_params
from jaxlm.run.folder import load_run, read_config
from jaxlm.run.hooks import WriteMetrics
from jaxlm.run.metrics import OF_CLOCKS
from jaxlm.training.step import StepMetrics

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
    return [{k: v for k, v in json.loads(line).items() if k not in OF_CLOCKS} for line in lines]


def test_a_run_knows_its_transcripts_and_samples_from_nothing(folder):
    config = json.loads((folder / "runs/tiny-1/config.json").read_text())["config"]
    assert config["data"]["val_path"] == str(folder / "val.csv")
    assert config["model"]["vocab_size"] == 30
    assert config["sample"]["prompt"] == ""
    assert json.loads((folder / "runs/tiny-1/tokenizer.json").read_text())["type"] == "transcript"


def mean_loss(model, params, rows):
    """Mean over the targets that are no padding, in numpy."""
    rows = np.asarray(rows, np.int32)
    logits = np.asarray(apply(model, params, jnp.asarray(rows[:, :-1]))[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
    return losses[rows[:, 1:] != 29].mean()


def test_the_losses_of_a_run_are_means_over_real_targets(folder):
    trained = load_run("runs/tiny-1", 40)
    corpus = load_corpus(trained.config.data, 16)
    first, last = (rows_of(folder / "runs/tiny-1")[i] for i in (0, -1))
    assert last["val_loss"] == pytest.approx(mean_loss(trained.model, trained.params, corpus.val.rows), rel=1e-5)
    slice_loss = mean_loss(trained.model, trained.params, corpus.train.rows[: len(corpus.val)])
    assert last["train_loss"] == pytest.approx(slice_loss, rel=1e-5)
    batch = corpus.train.rows[np.asarray(batch_starts(0, 0, trained.config.train.batch_size, len(corpus.train)))]
    untrained = init_params(trained.model, jax.random.key(0))
    assert first["loss"] == pytest.approx(mean_loss(trained.model, untrained, batch), rel=1e-5)


def test_the_logged_speed_counts_real_targets(folder):
    config = read_config(folder / "runs/tiny-1")
    written = []
    targets_per_window = load_corpus(config.data, 16).train.targets_per_window
    log = WriteMetrics(config, config.train.batch_size * targets_per_window, written.append)
    metrics = StepMetrics(jnp.int32(10), jnp.float32(1), jnp.float32(1), jnp.int32(0), jnp.bool_(False))
    log.on_chunk(metrics, steps=6, seconds=0.5)
    targets_a_row = 10 * (4 + 3 + 11 + 1 + 31) / 60  # 50 utterances, of which 10 take two rows
    assert written[0]["tokens_per_s"] == pytest.approx(6 * 8 * targets_a_row / 0.5, abs=0.1)


def test_evaluation_repeats_the_logged_loss_over_every_target(folder):
    code, out, _ = command("eval", "runs/tiny-1", "--step", "40", "--json")
    assert code == 0
    found, logged = json.loads(out), rows_of(folder / "runs/tiny-1")[-1]
    assert {name: found[name] for name in ("val_loss", "train_loss")} == {
        name: logged[name] for name in ("val_loss", "train_loss")
    }
    assert found["val_targets"] == 2 * (4 + 3 + 11 + 1 + 31) + 4
    text_bytes = 2 * (3 + 2 + 10 + 0 + 30) + 3  # <eos> is a target and no text
    bits = found["val_loss"] / math.log(2) * found["val_targets"]
    assert found["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-12)


def test_evaluation_finds_held_out_transcripts_that_moved_and_refuses_others(folder):
    (folder / "val.csv").rename(folder / "moved.csv")
    try:
        assert "val.csv does not exist" in command("eval", "runs/tiny-1")[2]
        assert command("eval", "runs/tiny-1", "--data.val-path", "moved.csv")[0] == 0
        code, _, err = command("eval", "runs/tiny-1", "--data.val-path", "train.csv")
        assert (code, "train.csv is not the held-out data of" in err) == (2, True)
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
        (["--data.path", "none.csv"], "none.csv does not exist"),
        (["--data.tokenizer", "none.json"], "none.json cannot be read (No such file or directory): give a tokenizer"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, words):
    (folder / "bad.csv").write_text("id,transcript\n1,FINE\n2,CAFé\n")
    code, out, err = command(*TRAIN, *SMALL, *STEPS, "--out", "refused", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (folder / "refused").exists()
