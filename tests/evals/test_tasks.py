"""The tasks of `jaxlm eval`, against the same numbers computed row by row."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from held_out import LINES, log_probs_of, logits_of, row_of
from support import command

from jaxlm.config import DataConfig, SamplingParams
from jaxlm.data.corpus import read_transcripts
from jaxlm.errors import PositionTableWarning, UserError
from jaxlm.evals import tasks
from jaxlm.evals.loss import evaluate

THIRTY = SamplingParams(max_new_tokens=30)

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


# Generation -----------------------------------------------------------------------------------------------------------


def test_generation_is_scored_by_the_model_and_by_an_oracle(trained, folder):
    sampling = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)
    found = tasks.generation(trained, sampling, batch_size=2, oracle=folder / "runs/tiny-1")
    prompts = [line[:40] for line in LINES if len(line) >= 40]
    assert [example["prompt"] for example in found["examples"]] == prompts
    assert [example["truth"] for example in found["examples"]] == [line[40:70] for line in LINES if len(line) >= 40]
    new = [example["generation"] for example in found["examples"]]
    assert all(len(text) == 30 and "<" not in text for text in new)
    ours = [log_probs_of(trained, row_of(p + n, trained.tokenizer))[40:] for p, n in zip(prompts, new, strict=True)]
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
    whole = tasks.generation(trained, sampling)
    assert whole["examples"] == found["examples"]  # in one batch, too
    assert "perplexity" not in whole
    assert tasks.generation(trained, dataclasses.replace(sampling, seed=4))["examples"] != found["examples"]


def test_generation_takes_the_options_of_sampling(trained, monkeypatch):
    asked = {}

    def generate(model, params, prompt, *, key, **arguments):
        asked.update(arguments, prompt=prompt.shape, keys=key.shape)
        raise InterruptedError

    monkeypatch.setattr(tasks, "generate", generate)
    options = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.5}
    options["max_new_tokens"] = 12
    with pytest.raises(InterruptedError):
        tasks.generation(trained, SamplingParams(forbidden_tokens=(3,), **options))
    asked_besides = {"prompt": (5, 41), "keys": (5,), "forbidden_tokens": (3, 28, 29), "stop_token": None}
    assert asked == {**asked_besides, **options}


def test_generation_of_fewer_tokens_is_compared_with_as_many(trained):
    found = tasks.generation(trained, SamplingParams(max_new_tokens=7, temperature=0))
    assert [example["truth"] for example in found["examples"]] == [line[40:47] for line in LINES if len(line) >= 40]
    assert {len(example["generation"]) for example in found["examples"]} == {7}
    with pytest.raises(UserError, match="stop_token = 27: the task generates rows of one length; leave it out"):
        tasks.generation(trained, SamplingParams(max_new_tokens=7, stop_token=27))


def test_generation_past_a_position_table_leaves_the_true_figure_out(text_run):
    learned = dataclasses.replace(text_run.config.model, position="learned", max_seq_len=48)
    table = 0.1 * jax.random.normal(jax.random.key(0), (48, learned.embed_dim))
    short = dataclasses.replace(
        text_run,
        config=dataclasses.replace(text_run.config, model=learned),
        model=text_run.model.clone(cfg=learned),
        params={**text_run.params, "position_embedding": table},
    )
    with pytest.warns(PositionTableWarning, match=r"prompt 40 \+ 30 new tokens pass the learned position table"):
        assert tasks.generation(short, THIRTY, limit=1)["true_log_prob_per_token"] is None


# What is refused, and the command -----------------------------------------------------------------------------------


def test_too_short_rows_and_changed_data_are_refused(trained, text_run, folder):
    few = folder / "few.csv"
    few.write_text("id,transcript\n0,A SHORT ONE\n1,ANOTHER\n2,LAST\n")
    data = DataConfig(path=str(few), tokenizer="transcript", val_fraction=0.4)
    other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
    with pytest.raises(ValueError, match="the data are not those of the run"):
        tasks.prediction(other)
    other = dataclasses.replace(other, corpus_sha256=read_transcripts(data).sha256)
    with pytest.raises(ValueError, match=r"no held-out transcript has 40 characters \(the longest has 7\)"):
        tasks.generation(other, THIRTY)
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
    sampling = ["eval", "runs/tiny-1", "--task", "generation", "--top-k", "5", "--seed", "2", "--oracle", "runs/tiny-1"]
    code, out, err = command(*sampling, "--json")
    assert code == 0, err
    expected = tasks.generation(trained, dataclasses.replace(THIRTY, top_k=5, seed=2), oracle=folder / "runs/tiny-1")
    found = json.loads(out)
    assert {name: found[name] for name in expected} == expected
    assert (found["top_k"], found["seed"], found["temperature"]) == (5, 2, 1.0)
    assert found["oracle"] == "runs/tiny-1"
    code, out, _ = command(*sampling)
    assert code == 0
    assert f"{expected['perplexity']:.6g}" in out
    assert expected["examples"][1]["truth"].split()[0] in out
