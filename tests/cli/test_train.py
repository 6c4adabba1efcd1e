"""`jaxlm train`: folders, numbers, warm-up, going on from a run, what it leaves and says."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import command, refused, snapshot

import jaxlm
from jaxlm.cli.options import parse_options, with_kinds
from jaxlm.cli.train import _defaults, _next_free, _TrainOptions
from jaxlm.config import OptimConfig
from jaxlm.config.presets import preset
from jaxlm.run.folder import load_run, read_config

RUN = ["train", "tiny", "--train.steps", "30", "--train.eval-every", "15", "--train.checkpoint-every", "15"]
SMALL = ["--model.num-layers", "1", "--optim.warmup-steps", "2", "--sample.max-new-tokens", "20"]
SHORT = ["--model.num-layers", "1", "--data.path", "text.txt", "--sample.max-new-tokens", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shakespeare):
    """A working folder with a short text of its own and runs/tiny-1, trained once."""
    root = tmp_path_factory.mktemp("work")
    (root / "text.txt").write_text(shakespeare.read_text()[:30_000])
    with contextlib.chdir(root):
        code, out, err = command(*RUN, *SMALL, "--data.path", "text.txt")
    assert code == 0, err
    assert len(out.strip("\n")) > 0
    assert "runs/tiny-1 (step 30" in err
    (root / "stderr.txt").write_text(err)
    return root


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_a_second_training_gets_the_next_number(folder):
    shutil.copytree("runs/tiny-1", "runs/tiny-2")
    code, _, err = command(*RUN, *SMALL, "--data.path", "text.txt", "--train.max-minutes", "0")
    shutil.rmtree("runs/tiny-2")
    assert code == 0
    assert "runs/tiny-3" in err


def test_training_leaves_what_it_says(folder):
    run = folder / "runs/tiny-1"
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "samples",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 10, 20, 30]
    assert [row["step"] for row in rows if "val_loss" in row] == [15, 30]
    assert rows[0].keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_s", "gflops_per_s", "elapsed_s"}
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["model"]["num_layers"] == 1
    assert config["device"]["platform"] == "cpu"
    assert "jax" in config["versions"]
    assert (run / "samples/step-30.txt").read_text()


def test_progress_on_stderr_has_no_eta_before_there_is_a_speed(folder):
    lines = [line for line in (folder / "stderr.txt").read_text().splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/30  loss ")
    assert "eta" not in lines[0]
    assert "step 15/30  evaluating" in lines
    assert any(line.startswith("step 30/30  loss ") and "val " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "decay"),
    [
        ("tiny", 0.1),
        ("tiny --optim.name adam", 0.0),
        ("nanogpt-cpu --optim.name adam", 0.0),
        ("nanogpt-cpu --optim.name adam --optim.weight-decay 0.1", 0.1),
        ("nanogpt-cpu --optim.name adamsn", 0.2),
    ],
)
def test_adam_decays_only_if_asked(arguments, decay):
    options = parse_options(_TrainOptions, arguments.split(), "train", _defaults)
    assert options.optim.weight_decay == decay


def test_another_schedule_takes_no_share_of_decay_from_the_run_before():
    given = {"model": {}, "optim": {"schedule": "linear"}}
    wsd = dataclasses.replace(preset("tiny"), optim=OptimConfig(schedule="wsd", decay_share=0.3, schedule_steps=9))
    assert with_kinds(wsd, given).optim == OptimConfig(schedule="linear")
    assert with_kinds(wsd, {"model": {}, "optim": {}}) == wsd


# Names of runs -------------------------------------------------------------------------------------------------------


def test_trainings_started_together_take_different_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(_next_free("tiny")) for _ in range(3)]
        for folder in folders:
            (folder / "config.json").write_text("{}")
    assert [str(folder) for folder in folders] == ["runs/tiny-1", "runs/tiny-2", "runs/tiny-3"]
    assert all(folder.is_dir() for folder in folders)
    with ThreadPoolExecutor(8) as pool, contextlib.ExitStack() as stack:
        names = list(pool.map(lambda _: stack.enter_context(_next_free("tiny")).name, range(40)))
    assert len({*names}) == 40


@pytest.mark.slow
def test_two_trainings_at_once_both_train(folder):
    arguments = ["train", "tiny", *SHORT, "--optim.warmup-steps", "1", "--train.steps", "2", "--train.eval-every", "2"]
    start = [sys.executable, "-m", "jaxlm", *arguments]
    before = {path.name for path in (folder / "runs").iterdir()}
    processes = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    new = {path.name for path in (folder / "runs").iterdir()} - before
    assert len(new) == 2
    for name in new:
        assert load_run(folder / "runs" / name).step == 2
        shutil.rmtree(folder / "runs" / name)


def test_a_refused_training_gives_its_name_back(folder):
    before = sorted(path.name for path in (folder / "runs").iterdir())
    code, _, err = command("train", "tiny", "--data.path", "nothing.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == before


def test_a_place_where_no_run_can_be_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    code, _, err = command("train", "tiny")
    assert (code, err.count("\n")) == (2, 1)
    assert "runs/tiny-1 cannot be created (Not a directory): choose another --out" in err


# The warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default:the preset's warm-up")
@pytest.mark.parametrize(
    ("arguments", "words", "warmup"),
    [
        pytest.param(
            ["tiny", "--train.steps", "20"],
            "the preset's warm-up of 20 steps shrinks to 0",
            0,
            marks=pytest.mark.slow,
        ),
        (["nanogpt-cpu", "--train.steps", "200"], "the preset's warm-up of 200 steps shrinks to 20", 20),
    ],
)
def test_a_presets_warm_up_fits_short_runs_and_a_warning_says_so(folder, arguments, words, warmup):
    out = ["--out", "short", "--train.max-minutes", "0"]
    code, _, err = command("train", *arguments, *SHORT, *out)
    assert code == 0, err
    assert err.count(f"jaxlm: warning: {words}") == 1
    assert read_config(folder / "short").optim.warmup_steps == warmup
    code, _, err = command("train", "--resume", *out)
    shutil.rmtree("short")
    assert (code, "warning: warmup" in err) == (0, False)  # the run has recorded what it uses


def test_a_warm_up_that_is_given_and_too_long_is_refused(folder):
    for warmup in ("20", "30"):  # 20 is the preset's own
        code, _, err = command("train", "tiny", *SHORT, "--train.steps", "20", "--optim.warmup-steps", warmup)
        assert (code, err.count("\n")) == (2, 1)
        assert f"warmup_steps = {warmup} is not below steps = 20: give a smaller --optim.warmup-steps" in err


# Going on from a run -------------------------------------------------------------------------------------------------

FROM = ["train", "--init-from", "runs/tiny-1"]
FEW = ["--train.steps", "4", "--optim.warmup-steps", "1", "--train.batch-size", "2", "--sample.max-new-tokens", "5"]


@pytest.fixture
def out(folder):
    yield folder / "out"
    shutil.rmtree(folder / "out", ignore_errors=True)


def test_without_a_preset_the_settings_are_those_of_the_source(folder, out):
    longer = ["--model.max-seq-len", "48", "--model.extend-positions", *FEW, "--out", "out"]
    code, _, err = command(*FROM, *longer)
    assert code == 0, err
    assert "run: out (step 4, val_loss" in err
    source, run = load_run("runs/tiny-1"), load_run(out)
    assert run.config.data == source.config.data
    assert run.config.optim == dataclasses.replace(source.config.optim, warmup_steps=1)
    assert run.config.model == dataclasses.replace(source.config.model, max_seq_len=48)
    entry = json.loads((out / "config.json").read_text())["init_from"]
    assert (entry["run"], entry["step"], len(entry["sha256"])) == (str(folder / "runs/tiny-1"), source.step, 64)
    code, _, err = command("train", "--resume", "--out", "out", "--train.steps", "6", "--optim.keep-schedule")
    assert code == 0, err
    assert load_run(out).step == 6
    assert json.loads((out / "config.json").read_text())["init_from"] == entry


def test_a_preset_gives_all_but_the_model_and_the_vocabulary(folder, out):
    at_once = ["--train.max-minutes", "0", "--data.path", "text.txt", "--sample.max-new-tokens", "5", "--out", "out"]
    code, _, err = command("train", "gpt2-124m", *FROM[1:], *at_once)
    assert code == 0, err
    source, run = load_run("runs/tiny-1"), load_run(out)
    assert (run.config.preset, run.config.optim) == ("gpt2-124m", preset("gpt2-124m").optim)
    assert run.config.train.batch_size == 480
    assert run.config.model == source.config.model
    assert run.config.data.tokenizer == "char"
    for name in ("embedding", "position_embedding"):
        np.testing.assert_array_equal(run.params[name], source.params[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--init-from", "text.txt"], "text.txt is not a run: it has no config.json"),
        (["--init-from", "empty"], "empty has no checkpoint yet"),
        (["--out", "runs/tiny-1"], "runs/tiny-1 already holds a run: continue it with --resume, or"),
        (["--resume", "--out", "runs/tiny-1"], "--init-from runs/tiny-1 is for a new run, and --resume goes on"),
        (["--model.max-seq-len", "64"], "max_seq_len = 64 is beyond the learned position table of runs/tiny-1, 32"),
        (["--model.extend-positions"], "--model.extend-positions has nothing to add: runs/tiny-1 has"),
        (["--model.num-layers", "2"], "block_1/attention/key/kernel is absent there, [32, 32] float32 here"),
        (["--model.family", "recurrent"], "the weights of runs/tiny-1 do not fit the model: block_0/attention/"),
        (["--model.vocab-size", "70"], "vocab_size = 70 is not the tokenizer's"),
        (["--data.tokenizer", "bpe"], "id 0 is '!', and '\\n' there; give --data.tokenizer char"),
        (
            ["--data.path", "other.txt"],
            "other.txt: characters 'Ж' are outside the vocabulary (first 'Ж' at position 2)",
        ),
        (["--optim.warmup-steps", "30"], "warmup_steps = 30 is not below steps = 30"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line_and_leaves_nothing(folder, arguments, words):
    (folder / "other.txt").write_text("toЖ be " * 99, encoding="utf-8")
    (folder / "empty").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(f"runs/tiny-1/{name}", "empty")
    before = snapshot(folder), sorted((folder / "runs").iterdir())
    assert words in refused(*FROM, *arguments)
    assert (snapshot(folder), sorted((folder / "runs").iterdir())) == before


def test_extending_without_a_source_is_refused(folder):
    assert "add --init-from, or leave it out" in refused("train", "tiny", *SHORT, "--model.extend-positions")


@pytest.mark.filterwarnings("default:checkpoint .* is damaged")
def test_a_damaged_source_gives_its_other_checkpoint_or_a_failed_check(folder, out):
    shutil.copytree("runs/tiny-1", "damaged")
    for step, code in ((30, 0), (15, 1)):
        (folder / f"damaged/checkpoints/{step}/manifest.json").write_text("{}")
        found, _, err = command("train", "--init-from", "damaged", *FEW, "--out", "out")
        assert found == code, err
        assert f"checkpoint damaged/checkpoints/{step} is damaged" in err
        if code == 0:
            assert json.loads((out / "config.json").read_text())["init_from"]["step"] == 15
            shutil.rmtree(out)
    assert err.count("\n") == 1
    assert not out.exists()
    shutil.rmtree("damaged")


# From Python ---------------------------------------------------------------------------------------------------------


def test_train_is_a_public_name_and_gives_what_the_command_gives(folder, tmp_path):
    config = read_config(folder / "runs/tiny-1")
    outcome = jaxlm.train(config, tmp_path / "again")
    assert (outcome.path, outcome.step, outcome.signum) == (tmp_path / "again", 30, None)
    rows = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder / "runs/tiny-1", outcome.path)
    ]
    assert outcome.val_loss == rows[0][-1]["val_loss"]
    assert [row.get("loss") for row in rows[0]] == [row.get("loss") for row in rows[1]]
    for name in ("path", "step", "val_loss", "signum"):
        assert f"`{name}`" in jaxlm.train.__doc__


def test_a_new_folder_that_somebody_has_removed_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _next_free("tiny") as folder:
        folder.rmdir()
    assert list((tmp_path / "runs").iterdir()) == []
