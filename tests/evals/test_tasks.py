"""The tasks of `jaxlm eval`, against the same numbers computed row by row."""

import contextlib
import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from support import apply, command
from tolerances import FLOAT32

from jaxlm.config import DataConfig
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.decode.score import score
from jaxlm.evals import tasks
from jaxlm.evals.loss import evaluate
from jaxlm.evals.scorers import RunOracle, load_oracle
from jaxlm.run.folder import load_run

LINES = [
    "THE SEA WAS CALM AND THE OLD MAN SLEPT",  # too short for every task but likelihood
    "NO ONE COULD SAY WHERE THE ROAD HAD BEEN",  # 40 characters: nothing follows the longer prompt
    "THE SHIP CAME IN AT DAWN WITH ITS SAILS TORN AND NOT A SOUL ON BOARD TO TELL OF THE NIGHT",
    "IT WAS THE SAME ROAD THAT THEY HAD TAKEN THE YEAR BEFORE AND",
    "WHO HAD LEFT THE DOOR OPEN SHE ASKED AND NOBODY SPOKE A WORD TO HER THAT EVENING OR THE NEXT",
    "",
    "THEN THE RAIN BEGAN TO FALL ON THE ROOFS OF",
]
TRAIN = ["train", "tiny", "--data.tokenizer", "transcript", "--data.path", "train.csv", "--data.val-path", "val.csv"]
SMALL = ["--model.num-layers", "1", "--model.max-seq-len", "96", "--model.position", "rope", "--train.steps", "20"]
RATE = ["--optim.learning-rate", "0.03", "--optim.warmup-steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with transcripts of its own and runs/tiny-1, trained once."""
    root = tmp_path_factory.mktemp("work")
    for name, lines in (("train", LINES * 4), ("val", LINES)):
        (root / f"{name}.csv").write_text("id,transcript\n" + "".join(f"{i},{line}\n" for i, line in enumerate(lines)))
    with contextlib.chdir(root):
        code, _, err = command(*TRAIN, *SMALL, *RATE)
    assert code == 0, err
    return root


@pytest.fixture(scope="module")
def trained(folder):
    return load_run(folder / "runs/tiny-1")


@pytest.fixture(scope="module")
def text_run(folder, trained):
    """The same network as a model of characters: the text is the transcripts' lines."""
    text = "\n".join(LINES * 5)
    (folder / "text.txt").write_text(text)
    made = CharTokenizer(text + "0123456789"[: 30 - len(set(text))])  # as many as the model has
    cfg = dataclasses.replace(trained.config, data=DataConfig(path=str(folder / "text.txt")))
    sha256 = tasks.load_corpus(cfg.data, 32).sha256
    return dataclasses.replace(trained, config=cfg, tokenizer=made, corpus_sha256=sha256)


def row_of(line, tokenizer):
    return [28, *tokenizer.encode(line).tolist()]


def logits_of(trained, row):
    """[len(row), V] after each token: one program, whatever the length, as the model is causal."""
    padded = np.array([[*row, *[0] * (96 - len(row))]])
    return np.asarray(apply(trained.model, trained.params, padded)[0][0], np.float64)[: len(row)]


def log_probs_of(trained, row):
    """The log-probability of each of row[1:], in numpy."""
    logits = logits_of(trained, row[:-1])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_probs, np.array(row[1:])[:, None], axis=-1)[:, 0]


# Prediction ----------------------------------------------------------------------------------------------------------


def predicted(trained, rows):
    """(nats, hits) of each of the last 10 tokens, the model run anew on what it has chosen so far."""
    nats, hits = [], []
    for row in rows:
        fed = list(row[:-10])
        for truth in row[-10:]:
            logits = logits_of(trained, fed)[-1]
            nats.append(np.log(np.exp(logits).sum()) - logits[truth])
            hits.append(logits.argmax() == truth)
            fed.append(int(logits.argmax()))
    return np.mean(nats), np.mean(hits)


def test_prediction_is_of_the_next_ten_under_greedy_feedback(trained):
    rows = [row_of(line, trained.tokenizer)[:41] for line in LINES if len(line) >= 40]
    nll, accuracy = predicted(trained, rows)
    assert accuracy > 0
    found = tasks.prediction(trained, batch_size=4)  # 4 rows and 1
    assert found == {"rows": 5, "nll": pytest.approx(nll, rel=1e-5), "accuracy": accuracy}
    some = tasks.prediction(trained, limit=4, batch_size=4)
    assert (some["rows"], some["nll"]) == (4, pytest.approx(predicted(trained, rows[:4])[0], rel=1e-5))


def test_prediction_of_a_text_takes_pieces_without_an_eos(text_run):
    text = "\n".join(LINES * 5)
    tokens = text_run.tokenizer.encode(text[int(0.9 * len(text)) :])
    rows = [tokens[start : start + 40].tolist() for start in (0, 40)]
    nll, accuracy = predicted(text_run, rows)
    found = tasks.prediction(text_run, limit=2)
    assert found == {"rows": 2, "nll": pytest.approx(nll, rel=1e-5), "accuracy": accuracy}


# Likelihood ----------------------------------------------------------------------------------------------------------


def test_likelihood_is_of_whole_transcripts_from_eos_to_eos(trained):
    sums = [log_probs_of(trained, [*row_of(line, trained.tokenizer), 28]).sum() for line in LINES]
    targets = sum(len(line) + 1 for line in LINES)
    assert tasks.likelihood(trained, batch_size=3) == {
        "rows": 7,
        "targets": targets,
        "log_prob_per_row": pytest.approx(np.mean(sums), rel=1e-5),
        "log_prob_per_token": pytest.approx(np.sum(sums) / targets, rel=1e-5),
        "perplexity": pytest.approx(np.exp(-np.sum(sums) / targets), rel=1e-4),
    }
    first = tasks.likelihood(trained, limit=3, batch_size=3)["log_prob_per_row"]
    assert first == pytest.approx(np.mean(sums[:3]), rel=1e-5)


def test_rows_longer_than_the_training_context_are_scored_whole(trained):
    shorter = dataclasses.replace(trained.config.model, max_seq_len=16)
    config = dataclasses.replace(trained.config, model=shorter)
    short = dataclasses.replace(trained, config=config, model=trained.model.clone(cfg=shorter))
    assert tasks.likelihood(short, limit=3) == tasks.likelihood(trained, limit=3)


def test_likelihood_of_a_text_is_its_validation_loss(text_run):
    found, losses = tasks.likelihood(text_run), evaluate(text_run)
    assert found["targets"] == losses["val_targets"] > 96
    assert -found["log_prob_per_token"] == pytest.approx(losses["val_loss"], rel=1e-5)


# Generation and oracles ----------------------------------------------------------------------------------------------


def test_generation_is_judged_by_the_model_and_by_an_oracle(trained, folder):
    found = tasks.generation(trained, batch_size=2, temperature=0.9, seed=3, oracle=folder / "runs/tiny-1")
    prompts = [line[:40] for line in LINES if len(line) >= 40]
    assert [example["prompt"] for example in found["examples"]] == prompts
    assert [example["truth"] for example in found["examples"]] == [line[40:70] for line in LINES if len(line) >= 40]
    drawn = [example["generation"] for example in found["examples"]]
    assert all(len(text) == 30 and "<" not in text for text in drawn)
    ours = [log_probs_of(trained, row_of(p + d, trained.tokenizer))[40:] for p, d in zip(prompts, drawn, strict=True)]
    truths = [log_probs_of(trained, row_of(line[:70], trained.tokenizer))[40:] for line in LINES if len(line) > 40]
    mean, true_mean = np.mean(ours), np.concatenate(truths).mean()
    assert found["log_prob_per_token"] == pytest.approx(mean, rel=1e-4)
    assert found["true_log_prob_per_token"] == pytest.approx(true_mean, rel=1e-4)
    # The oracle is the model itself, and a token is a character.
    assert found["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-4)
    assert found["nats_per_character"] == pytest.approx(-mean, rel=1e-4)
    assert found["true_perplexity"] == pytest.approx(np.exp(-true_mean), rel=1e-4)
    assert found["true_nats_per_character"] == pytest.approx(-true_mean, rel=1e-4)
    assert (found["rows"], found["true_rows"]) == (5, 4)
    whole = tasks.generation(trained, temperature=0.9, seed=3)
    assert whole["examples"] == found["examples"]  # in one batch, too
    assert "perplexity" not in whole
    assert tasks.generation(trained, temperature=0.9, seed=4)["examples"] != found["examples"]


def test_generation_takes_the_filters(trained, monkeypatch):
    asked = {}

    def generate(model, params, prompt, *, key, **arguments):
        asked.update(arguments, prompt=prompt.shape, keys=key.shape)
        raise InterruptedError

    monkeypatch.setattr(tasks, "generate", generate)
    with pytest.raises(InterruptedError):
        tasks.generation(trained, temperature=0.5, top_k=7, top_p=0.8)
    filters = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "forbidden_tokens": [28, 29]}
    assert asked == {"prompt": (5, 41), "keys": (5,), "max_new_tokens": 30, **filters}


def test_generation_past_a_position_table_leaves_the_true_figure_out(text_run):
    learned = dataclasses.replace(text_run.config.model, position="learned", max_seq_len=48)
    table = 0.1 * jax.random.normal(jax.random.key(0), (48, learned.embed_dim))
    short = dataclasses.replace(
        text_run,
        config=dataclasses.replace(text_run.config, model=learned),
        model=text_run.model.clone(cfg=learned),
        params={**text_run.params, "position_embedding": table},
    )
    with pytest.warns(UserWarning, match=r"prompt 40 \+ 30 new tokens pass the learned position table"):
        found = tasks.generation(short, limit=1)
    assert found["true_log_prob_per_token"] is None
    with pytest.raises(ValueError, match=r"oracle .*: a row of 69 targets passes .* table of max_seq_len = 48"):
        RunOracle(short, 8)(["A" * 70])
    log_probs, _ = RunOracle(short, 8)(["A" * 49])  # padded to a power of two, it would not fit
    expected = score(short.model, short.params, short.tokenizer.encode("A" * 49)[None])
    np.testing.assert_allclose(log_probs, expected, rtol=100 * FLOAT32)


def test_an_oracle_names_what_it_cannot_read(trained):
    oracle = RunOracle(trained, 8)
    with pytest.raises(ValueError, match=r"oracle .*tiny-1: characters 'é' are outside the vocabulary"):
        oracle(["CAFé"])
    log_probs, tokens = oracle(["NO", "YES WE CAN", "A"])
    assert tokens.tolist() == [3, 11, 2]
    for text, log_prob in zip(["NO", "YES WE CAN", "A"], log_probs, strict=True):
        expected = log_probs_of(trained, row_of(text, trained.tokenizer)).sum()
        np.testing.assert_allclose(log_prob, expected, rtol=100 * FLOAT32)


def test_a_folder_that_is_no_oracle_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a run nor a Hugging Face folder"):
        load_oracle(tmp_path, 8)
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(ValueError, match=r"is neither a run nor a Hugging Face folder"):
        load_oracle(tmp_path, 8)


def test_a_hugging_face_oracle_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"for which torch is missing: pip install 'jaxlm\[parity\]'"):
        load_oracle(tmp_path, 8)


# What is refused, and the command -----------------------------------------------------------------------------------


def test_too_short_rows_and_changed_data_are_refused(trained, text_run, folder):
    few = folder / "few.csv"
    few.write_text("id,transcript\n0,A SHORT ONE\n1,ANOTHER\n2,LAST\n")
    data = DataConfig(path=str(few), tokenizer="transcript", val_fraction=0.4)
    other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
    with pytest.raises(ValueError, match="the data are not those of the run"):
        tasks.prediction(other)
    other = dataclasses.replace(other, corpus_sha256=tasks.read_transcripts(data).sha256)
    with pytest.raises(ValueError, match=r"no held-out transcript has 40 characters \(the longest has 7\)"):
        tasks.generation(other)
    data = dataclasses.replace(text_run.config.data, val_fraction=0.01)
    short = dataclasses.replace(text_run, config=dataclasses.replace(text_run.config, data=data))
    with pytest.raises(ValueError, match=r"the validation split has 19 tokens, fewer than the 40 of a row"):
        tasks.prediction(short)


def test_the_command_says_what_the_tasks_find(trained, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for task in ("prediction", "likelihood"):
        code, out, err = command("eval", "runs/tiny-1", "--task", task, "--limit", "4", "--json")
        assert code == 0, err
        expected = getattr(tasks, task)(trained, limit=4)
        assert json.loads(out) == {"run": "runs/tiny-1", "step": 20, "task": task, **expected}
    drawing = ["eval", "runs/tiny-1", "--task", "generation", "--top-k", "5", "--seed", "2", "--oracle", "runs/tiny-1"]
    code, out, err = command(*drawing, "--json")
    assert code == 0, err
    expected = tasks.generation(trained, top_k=5, seed=2, oracle=folder / "runs/tiny-1")
    found = json.loads(out)
    assert {name: found[name] for name in expected} == expected
    assert (found["top_k"], found["seed"], found["temperature"]) == (5, 2, 1.0)
    assert found["oracle"] == "runs/tiny-1"
    code, out, _ = command(*drawing)
    assert code == 0
    assert f"{expected['perplexity']:.6g}" in out
    assert expected["examples"][1]["truth"].split()[0] in out
