"""`jaxlm train`: folders, numbers, warm-up, what it leaves and says."""

import contextlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import command

import jaxlm
from jaxlm.cli.options import parse_options
from jaxlm.cli.train import _defaults, _next_free, _TrainOptions
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
    assert rows[0].keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
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
        (["tiny", "--train.steps", "20"], "the preset's warm-up of 20 steps shrinks to 0", 0),
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
