"""Temperature scaling: the fit against known temperatures, and what the prediction task makes of it."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from held_out import LINES, logits_of, row_of
from support import command

from jaxlm.config import DataConfig
from jaxlm.data.corpus import read_transcripts
from jaxlm.errors import UserError
from jaxlm.evals import tasks
from jaxlm.evals.calibration import HIGHEST, LOWEST, fit_temperature

OTHERS = [
    "A SHIP WITH RED SAILS LEFT THE HARBOUR AT NOON",
    "HE COUNTED THE STARS UNTIL THE MORNING CAME TO",
    "TOO SHORT",
    "THE WHEAT STOOD HIGH AND THE BARN DOOR WAS SHUT",
    "SHE WROTE A LETTER AND NEVER SENT IT ANYWHERE AT",
]


def nll(logits, targets, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    right = np.take_along_axis(scaled, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return float((np.log(np.exp(scaled).sum(-1)) - right).mean())


@pytest.fixture
def elsewhere(trained, tmp_path):
    """The trained network as a run whose training transcripts are others."""
    for name, lines in (("train", OTHERS), ("val", LINES)):
        (tmp_path / f"{name}.csv").write_text("id,transcript\n" + "".join(f"{i},{x}\n" for i, x in enumerate(lines)))
    data = DataConfig(path=str(tmp_path / "train.csv"), val_path=str(tmp_path / "val.csv"), tokenizer="transcript")
    config = dataclasses.replace(trained.config, data=data)
    return dataclasses.replace(trained, config=config, corpus_sha256=read_transcripts(data).sha256)


def greedy_logits(run, rows, count):
    """[R, count, V]: the logits after each row and the choices made so far, the model run anew for each."""
    found = []
    for row in rows:
        fed = list(row)
        for _ in range(count):
            found.append(logits_of(run, fed)[-1])
            fed.append(int(found[-1].argmax()))
    return np.reshape(found, (len(rows), count, -1))


# The fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [0.2, 1.0, 3.7, 40.0])
def test_multiples_of_calibrated_logits_give_the_multiple_back(multiple):
    counts = np.array([[5, 2, 1], [1, 6, 1], [2, 2, 4]])  # how often each token follows, of 8
    logits = np.repeat(np.log(counts / 8), 8, axis=0).astype(np.float32)
    targets = np.concatenate([np.repeat(np.arange(3), row) for row in counts])
    assert fit_temperature(multiple * logits, targets) == pytest.approx(multiple, rel=1e-3)


def test_no_other_temperature_is_better():
    logits = 6 * np.asarray(jax.random.normal(jax.random.key(0), (5, 7, 11)))
    targets = np.asarray(jax.random.categorical(jax.random.key(1), logits / 2.5))
    best = fit_temperature(logits, targets)
    assert 1.5 < best < 4
    least = nll(logits, targets, best)
    assert least < min(nll(logits, targets, best * factor) for factor in (0.5, 0.98, 1.02, 2))


def test_logits_that_are_always_right_or_always_wrong_have_a_temperature_too():
    logits = np.array([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    assert LOWEST <= fit_temperature(logits, logits.argmax(-1)) < 0.2
    assert fit_temperature(logits, logits.argmin(-1)) == pytest.approx(HIGHEST, rel=1e-4)


# The prediction task -------------------------------------------------------------------------------------------------


def test_the_temperature_is_that_of_the_training_split_and_changes_no_choice(elsewhere):
    rows = [row_of(line, elsewhere.tokenizer) for line in OTHERS if len(line) >= 40]
    logits, targets = greedy_logits(elsewhere, [row[:31] for row in rows], 10), np.array([row[31:41] for row in rows])
    expected = fit_temperature(logits, targets)
    plain, found = tasks.prediction(elsewhere), tasks.prediction(elsewhere, batch_size=3, temperature="fit")
    assert found["temperature"] == pytest.approx(expected, rel=1e-3)
    assert LOWEST < expected < HIGHEST
    assert found["fit_rows"] == 4
    assert {name: found[name] for name in plain} == {**plain, "nll": pytest.approx(plain["nll"], rel=1e-6)}
    held = [row_of(line, elsewhere.tokenizer) for line in LINES if len(line) >= 40]
    logits, targets = greedy_logits(elsewhere, [row[:31] for row in held], 10), np.array([row[31:41] for row in held])
    assert found["calibrated_nll"] == pytest.approx(nll(logits, targets, expected), rel=1e-4)
    assert found["calibrated_nll"] != pytest.approx(found["nll"], rel=1e-3)


def test_few_of_many_rows_are_spread_over_the_split(elsewhere, monkeypatch):
    monkeypatch.setattr(tasks, "FIT_ROWS", 2)
    rows = [row_of(line, elsewhere.tokenizer) for line in (OTHERS[0], OTHERS[-1])]
    logits, targets = greedy_logits(elsewhere, [row[:31] for row in rows], 10), np.array([row[31:41] for row in rows])
    found = tasks.prediction(elsewhere, temperature="fit")
    assert (found["fit_rows"], found["temperature"]) == (2, pytest.approx(fit_temperature(logits, targets), rel=1e-3))


def test_prompts_of_a_file_are_calibrated_on_rows_as_long(elsewhere, tmp_path):
    held, others = ([row_of(x, elsewhere.tokenizer) for x in lines] for lines in (LINES[2:4], OTHERS))
    path = tmp_path / "prompts.npz"
    np.savez(path, inp=[row[:13] for row in held], tgt=[row[13:17] for row in held], vocabulary=np.array(
        [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ' ", "<eos>", "<pad>"]
    ))  # fmt: skip
    others = [row for row in others if len(row) >= 17]
    logits, targets = greedy_logits(elsewhere, [row[:13] for row in others], 4), np.array([r[13:17] for r in others])
    found = tasks.prediction(elsewhere, temperature="fit", prompts=path)
    assert found["temperature"] == pytest.approx(fit_temperature(logits, targets), rel=1e-3)


def test_a_text_is_calibrated_on_its_training_tokens(text_run):
    text = "\n".join(LINES * 5)
    tokens = text_run.tokenizer.encode(text[: int(0.9 * len(text))])
    rows = tokens[: len(tokens) // 40 * 40].reshape(-1, 40)
    logits = greedy_logits(text_run, rows[:, :30].tolist(), 10)
    found = tasks.prediction(text_run, temperature="fit")
    assert found["temperature"] == pytest.approx(fit_temperature(logits, rows[:, 30:]), rel=1e-3)
    assert found["fit_rows"] == len(rows)


def test_a_given_temperature_divides_the_logits_that_are_saved(trained, tmp_path):
    plain = tasks.prediction(trained, save=tmp_path / "plain.npz")
    found = tasks.prediction(trained, temperature=2.5, save=tmp_path / "scaled.npz")
    with np.load(tmp_path / "plain.npz") as raw, np.load(tmp_path / "scaled.npz") as scaled:
        np.testing.assert_allclose(scaled["logits"] * 2.5, raw["logits"], rtol=1e-6)
        assert scaled["predicted_texts"].tolist() == raw["predicted_texts"].tolist()
        calibrated = nll(scaled["logits"], scaled["targets"])
    assert found == {**plain, "temperature": 2.5, "calibrated_nll": pytest.approx(calibrated, rel=1e-6)}
    assert calibrated != pytest.approx(plain["nll"], rel=1e-3)


@pytest.mark.parametrize("temperature", [0, -1.0, 1e-7, math.inf, math.nan, "best"])
def test_a_temperature_that_divides_nothing_is_refused(trained, temperature):
    with pytest.raises(UserError, match=r"^temperature = .* cannot divide logits: give a finite number of at least"):
        getattr(tasks.prediction, "__wrapped__", tasks.prediction)(trained, temperature=temperature)


def test_the_command_fits_or_takes_a_temperature(trained, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = ["eval", "runs/tiny-1", "--task", "prediction"]
    for option, temperature in ((["--fit-temperature"], "fit"), (["--temperature", "2.5"], 2.5)):
        code, out, err = command(*run, *option, "--json")
        assert code == 0, err
        expected = tasks.prediction(trained, temperature=temperature)
        assert json.loads(out) == {"run": "runs/tiny-1", "step": 20, "task": "prediction", **expected}
    code, out, _ = command(*run, "--fit-temperature")
    assert code == 0
    assert "calibrated_nll" in out
    for arguments, words in (
        ([*run, "--fit-temperature", "--temperature", "2"], "--temperature 2.0 is not read beside --fit-temperature"),
        ([*run, "--temperature", "0"], "temperature = 0.0 cannot divide logits: give a finite number"),
        ([*run, "--temperature", "-1"], "temperature = -1.0 is out of range"),
        (
            ["eval", "runs/tiny-1", "--fit-temperature"],
            "is not for --task loss: leave it out, or use --task prediction",
        ),
    ):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
