"""The tasks of `jaxlm eval`, against the same numbers computed row by row."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from held_out import LINES, log_probs_of, logits_of, row_of
from support import command, refused

from jaxlm.config import DataConfig, SamplingParams
from jaxlm.data.corpus import read_transcripts
from jaxlm.errors import PositionTableWarning, UserError
from jaxlm.evals import tasks
from jaxlm.evals.loss import evaluate
from jaxlm.evals.rows import symbols

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


# Files and beams ----------------------------------------------------------------------------------------------------


def prompts_in(tmp_path, rows, cut):
    """A file of the first `cut` ids of each row without <eos>, and of all that follow, in reverse order of the ids."""
    symbols = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ' ", "<eos>", "<pad>"]
    ids = 29 - np.array([row[1:] for row in rows])
    path = tmp_path / "prompts.npz"
    np.savez(path, inp=ids[:, :cut], tgt=ids[:, cut:], vocabulary=np.array(symbols[::-1]))
    return path


def test_prediction_is_saved_and_of_prompts_in_a_file_the_same(trained, tmp_path):
    rows = [row_of(line, trained.tokenizer)[:41] for line in LINES if len(line) >= 40]
    expected = tasks.prediction(trained)
    found = tasks.prediction(
        trained, batch_size=2, prompts=prompts_in(tmp_path, rows, 30), save=tmp_path / "predicted.npz"
    )
    assert found == {**expected, "nll": pytest.approx(expected["nll"], rel=1e-6)}
    with np.load(tmp_path / "predicted.npz") as file:
        saved = dict(file)
    np.testing.assert_array_equal(saved["prompts"], [row[:31] for row in rows])
    np.testing.assert_array_equal(saved["targets"], [row[31:] for row in rows])
    logits = saved["logits"].astype(np.float64)
    assert (saved["logits"].dtype, logits.shape) == (np.float32, (5, 10, 30))
    right = np.take_along_axis(logits, saved["targets"][..., None], axis=-1)[..., 0]
    assert (np.log(np.exp(logits).sum(-1)) - right).mean() == pytest.approx(expected["nll"], rel=1e-6)
    np.testing.assert_allclose(logits[1, 0], logits_of(trained, rows[1][:31])[-1], atol=1e-4)
    assert saved["prompt_texts"].tolist() == [line[:30] for line in LINES if len(line) >= 40]
    assert saved["target_texts"].tolist() == [line[30:40] for line in LINES if len(line) >= 40]
    spelled = saved["vocabulary"][logits.argmax(-1)]
    assert saved["predicted_texts"].tolist() == ["".join(row) for row in spelled]
    assert not [name for name, array in saved.items() if array.dtype == object]


def test_prompts_without_true_ids_have_logits_and_no_score(trained, tmp_path):
    path = tmp_path / "prompts.npz"
    np.savez(path, inp=np.array([row_of("THE SEA WAS", trained.tokenizer)]), vocabulary=symbols(trained.tokenizer))
    found = tasks.prediction(trained, prompts=path, save=tmp_path / "predicted.npz")
    assert found == {"rows": 1, "nll": None, "accuracy": None}
    with np.load(tmp_path / "predicted.npz") as saved:
        assert set(saved.files) == {"prompts", "prompt_texts", "logits", "predicted_texts", "vocabulary"}
        assert saved["logits"].shape == (1, 10, 30)
    assert "truth" not in tasks.generation(trained, THIRTY, prompts=path)["examples"][0]


def test_generations_are_saved_and_those_of_prompts_in_a_file_are_the_same(trained, tmp_path, folder):
    sampling = SamplingParams(max_new_tokens=12, seed=3)
    lines = [line for line in LINES if len(line) >= 60]
    rows = [row_of(line[:60], trained.tokenizer) for line in lines]
    path = prompts_in(tmp_path, rows, 40)
    oracle = folder / "runs/tiny-1"
    found = tasks.generation(trained, sampling, prompts=path, save=tmp_path / "new.npz", oracle=oracle)
    assert [example["prompt"] for example in found["examples"]] == [line[:40] for line in lines]
    assert [example["truth"] for example in found["examples"]] == [line[40:52] for line in lines]
    assert found["true_nats_per_character"] == pytest.approx(-found["true_log_prob_per_token"], rel=1e-4)
    with np.load(tmp_path / "new.npz") as saved:
        np.testing.assert_array_equal(saved["prompts"], [row[:41] for row in rows])
        assert saved["generated"].shape == (len(lines), 12)
        spelled = ["".join(row) for row in saved["vocabulary"][saved["generated"]]]
        assert saved["generated_texts"].tolist() == spelled == [one["generation"] for one in found["examples"]]
        assert saved["true_texts"].tolist() == [line[40:52] for line in lines]
        assert saved["prompt_texts"].tolist() == [line[:40] for line in lines]


def test_a_file_that_cannot_be_saved_is_refused_before_anything_is_computed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "held_out_rows", None)
    (tmp_path / "old.npz").write_text("kept")
    for name, words in (
        ("old.npz", "old.npz exists already: choose another name, or move it away"),
        ("none/new.npz", "new.npz cannot be written: there is no folder"),
        ("new.txt", "new.txt is not the name of an .npz file: give one that ends in .npz"),
    ):
        with pytest.raises(UserError, match=words):
            tasks.prediction(trained, save=tmp_path / name)
        with pytest.raises(UserError, match=words):
            tasks.generation(trained, THIRTY, save=tmp_path / name)
    assert (tmp_path / "old.npz").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["old.npz"]


def test_generation_by_beams_is_likelier_than_by_greedy_choice(trained):
    greedy = tasks.generation(trained, dataclasses.replace(THIRTY, temperature=0))
    one = tasks.generation(trained, THIRTY, beam_width=1)
    assert one["examples"] == greedy["examples"]
    assert one["log_prob_per_token"] == pytest.approx(greedy["log_prob_per_token"], rel=1e-5)
    wide = tasks.generation(trained, THIRTY, batch_size=2, beam_width=4)
    assert wide["log_prob_per_token"] > one["log_prob_per_token"]
    first = wide["examples"][0]
    row = row_of(first["prompt"] + first["generation"], trained.tokenizer)
    alone = tasks.generation(trained, THIRTY, limit=1, beam_width=4)
    assert log_probs_of(trained, row)[40:].mean() == pytest.approx(alone["log_prob_per_token"], rel=1e-4)
    unlike = dataclasses.replace(THIRTY, forbidden_tokens=(4, 27))
    assert not set("E ") & set(tasks.generation(trained, unlike, beam_width=2)["examples"][0]["generation"])
    with pytest.raises(UserError, match=r"top_k = 5 is not read by beam search: leave it out, or leave beam_width out"):
        tasks.generation(trained, dataclasses.replace(THIRTY, top_k=5), beam_width=2)


# What is refused, and the command -----------------------------------------------------------------------------------


def test_too_short_rows_and_changed_data_are_refused(trained, text_run, folder):
    few = folder / "few.csv"
    few.write_text("id,transcript\n0,A SHORT ONE\n1,ANOTHER\n2,LAST\n")
    data = DataConfig(path=str(few), tokenizer="transcript", val_fraction=0.4)
    other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
    with pytest.raises(ValueError, match="the data are not those of the run"):
        tasks.prediction(other)
    other = dataclasses.replace(other, corpus_sha256=read_transcripts(data).sha256)
    with pytest.raises(ValueError, match=r"no validation transcript has 40 characters \(the longest has 7\)"):
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


def test_the_command_reads_prompts_saves_and_searches(trained, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [row_of(line, trained.tokenizer)[:41] for line in LINES if len(line) >= 40]
    files = ["--prompts", prompts_in(tmp_path, rows, 30), "--save", tmp_path / "new.npz"]
    code, out, err = command("eval", "runs/tiny-1", "--task", "prediction", *files, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["prompts"], found["save"], found["rows"]) == (str(files[1]), str(files[3]), 5)
    with np.load(tmp_path / "new.npz") as saved:
        assert saved["logits"].shape == (5, 10, 30)
    beams = ["--task", "generation", "--beam-width", "2", "--max-new-tokens", "5"]
    code, out, err = command("eval", "runs/tiny-1", *beams, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["examples"] == tasks.generation(trained, SamplingParams(max_new_tokens=5), beam_width=2)["examples"]
    assert found["beam_width"] == 2
    assert "temperature" not in found
    generation, prediction = (["eval", "runs/tiny-1", "--task", task] for task in ("generation", "prediction"))
    for arguments, words in (
        ([*prediction, *files], "new.npz exists already"),
        ([*prediction, "--beam-width", "2"], "--beam-width 2 is not for --task prediction: leave it out"),
        ([*generation, "--beam-width", "0"], "beam_width = 0"),
        ([*generation, "--beam-width", "2", "--temperature", "0"], "temperature = 0.0 is not read by beam search"),
        (["eval", "runs/tiny-1", "--save", "x.npz"], "use --task prediction or generation"),
        (
            ["eval", "runs/tiny-1", *prediction[1:], "--save", "x.npz"],
            "--save x.npz is one file, but there are 2 runs: give one",
        ),
        ([*prediction, *files[:2], "--data.path", "val.csv"], "--data.path val.csv is not read beside --prompts"),
    ):
        assert words in refused(*arguments)
    assert not (folder / "x.npz").exists()


def test_a_perplexity_that_no_float_holds_is_infinite():
    def scorer(texts):
        return np.array([-1e6 * len(text) for text in texts]), np.array([len(text) for text in texts])

    found = tasks.score_continuations(scorer, ["a"], ["abc"])
    assert found == {"perplexity": np.inf, "nats_per_character": 1e6}
