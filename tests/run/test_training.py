"""Runs that are stopped, killed, damaged and resumed. The processes are real ones."""

import dataclasses
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support import command

from jaxlm.config import DataConfig, ModelConfig, OptimConfig, presets
from jaxlm.config.presets import preset
from jaxlm.data.batches import TokenStream, WindowBlock
from jaxlm.errors import CheckError, UserError
from jaxlm.evals.loss import evaluate
from jaxlm.ops import canary
from jaxlm.optim import build_schedule
from jaxlm.run import checkpoint, metrics
from jaxlm.run.folder import load_run, read_config
from jaxlm.run.samples import sample
from jaxlm.run.session import new_session, resumed_session
from jaxlm.run.training import train

STEPS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory, shakespeare):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(shakespeare.read_text()[:30_000])
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, num_layers=1, dropout=0.1),
        data=DataConfig(path=str(path)),
        optim=dataclasses.replace(tiny.optim, warmup_steps=5),
        train=dataclasses.replace(tiny.train, steps=STEPS, log_every=5, eval_every=30, checkpoint_every=10),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train(config, out)
    assert (outcome.step, outcome.signum) == (STEPS, None)
    return out


def rows(out):
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in metrics.OF_CLOCKS} for row in lines]


def assert_same_run(out, whole, step=STEPS):
    ours, theirs = load_run(out, step), load_run(whole, step)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert rows(out) == rows(whole)


def start(config, out, *options):
    """`jaxlm train` as a process, with the config of the tests (its preset and the changes to it)."""
    arguments = ["--out", str(out), *options]
    if "--resume" not in options:
        arguments += ["--model.num-layers", "1", "--model.dropout", "0.1", "--data.path", config.data.path]
        arguments += ["--optim.warmup-steps", "5", "--train.steps", str(STEPS), "--train.log-every", "5"]
        arguments += ["--train.eval-every", "30", "--train.checkpoint-every", "10"]
    command = [sys.executable, "-m", "jaxlm", "train", "tiny", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_twice_and_resumed_a_run_is_bitwise_the_uninterrupted_one(config, whole, tmp_path):
    out = tmp_path / "killed"
    for kill, wanted in enumerate((10, 20)):
        process = start(config, out, *(["--resume"] if kill else []))
        # The second kill comes in the middle of a save, the first between two.
        sign = f".{wanted}.*.partial" if kill == 1 else str(wanted)
        wait_for(process, lambda sign=sign: any((out / "checkpoints").glob(sign)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert max(checkpoint.steps(out / "checkpoints")) < STEPS
    process = start(config, out, "--resume")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert_same_run(out, whole)
    assert not list(out.rglob("*.partial"))  # what the kills left is gone


@pytest.mark.parametrize(
    ("base", "options", "kept"),
    [
        (
            "chargpt",
            "sgd --optim.arguments momentum=0.9 nesterov=true",
            {"arguments": ("momentum=0.9", "nesterov=true")},
        ),
        ("chargpt", "adamsn --optim.subset per_input", {"b2": 0.95, "subset": "per_input"}),
        pytest.param("chargpt", "adafactor", {"b2": 0.95}, marks=pytest.mark.slow),
        pytest.param("chargpt", "adam", {"b2": 0.95, "weight_decay": 0.0}, marks=pytest.mark.slow),
        ("another", "lion", {}),
    ],
)
def test_another_optimizer_on_a_preset_drops_what_it_does_not_read(config, tmp_path, monkeypatch, base, options, kept):
    usual = {"learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0}
    rmsprop = OptimConfig(name="rmsprop", arguments=("decay=0.5",), **usual)
    another = dataclasses.replace(preset("chargpt"), preset="another", optim=rmsprop)
    monkeypatch.setitem(presets.PRESETS, "another", lambda: another)
    few = ["--train.steps", 6, "--data.path", config.data.path, "--sample.max-new-tokens", 5, "--out", tmp_path / "run"]
    few += ["--model.family", "embedding_bigram", "--model.no-tie-embeddings", "--optim.learning-rate", "0.1"]
    code, _, err = command("train", base, *few, "--optim.name", *options.split())
    assert code == 0, err
    assert read_config(tmp_path / "run").optim == OptimConfig(name=options.split()[0], **usual, **kept)
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]


def test_resumed_with_factored_moments_and_momentum_a_run_is_bitwise_the_uninterrupted_one(config, tmp_path):
    optim = OptimConfig(name="adafactor", b2=0.9, warmup_steps=5, arguments=("momentum=0.9",))
    rhythm = dataclasses.replace(config.train, steps=12, eval_every=12, checkpoint_every=6)
    model = ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=24, tie_embeddings=False)
    factored = dataclasses.replace(config, model=model, optim=optim, train=rhythm)
    train(factored, tmp_path / "whole")
    assert read_config(tmp_path / "whole").optim == optim
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/12")
    train(read_config(tmp_path / "resumed"), tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", 12)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_says_so_and_sets_the_exit_code(config, whole, tmp_path, signum, code):
    out = tmp_path / "stopped"
    process = start(config, out, "--train.max-minutes", "5")
    wait_for(process, (out / "metrics.jsonl").exists)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    last = max(checkpoint.steps(out / "checkpoints"))
    assert f"stopped by {signal.Signals(signum).name} at step {last}; saved" in err
    assert "Traceback" not in err
    train(dataclasses.replace(read_config(out)), out, resume=True)
    assert_same_run(out, whole)


def test_a_time_limit_saves_and_ends_well(config, whole, tmp_path):
    out = tmp_path / "limited"
    limited = dataclasses.replace(config, train=dataclasses.replace(config.train, max_minutes=0.0))
    outcome = train(limited, out)
    assert (outcome.step, outcome.signum) == (0, None)
    assert checkpoint.steps(out / "checkpoints") == [0]
    outcome = train(config, out, resume=True)
    assert outcome.step == STEPS
    assert_same_run(out, whole)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(config, whole, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(whole, out)
    newest = out / "checkpoints" / str(STEPS)
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x00\x01")
    with pytest.warns(UserWarning, match=r"60 is damaged: .* has changed; resuming from step 50"):
        train(config, out, resume=True)
    assert_same_run(out, whole)
    assert (out / "checkpoints" / ".60.damaged").is_dir()
    (out / "checkpoints" / "60" / "manifest.json").write_text("")
    with pytest.warns(UserWarning, match="60 is damaged: its manifest is missing, cannot be read or has changed"):
        assert load_run(out).step == 50
    for step in checkpoint.steps(out / "checkpoints"):
        (out / "checkpoints" / str(step) / "manifest.json").write_text("")
    with pytest.raises(CheckError, match="is damaged"):
        load_run(out)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(config, tmp_path):
    bad = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, learning_rate=1e30, schedule="constant", clip_norm=None)
    )
    with pytest.raises(CheckError, match=r"step \d+: loss .*nan.* keeps its last checkpoint"):
        train(bad, tmp_path / "nan")
    assert checkpoint.steps(tmp_path / "nan" / "checkpoints") == []


def test_skipped_steps_are_told_and_counted_across_resumption(config, tmp_path, monkeypatch, capsys):
    """Steps 4, 5, 12 and 20 to 22 have no finite gradient, and two in a row may be skipped."""
    out, bad = tmp_path / "skipping", {4, 5, 12, 20, 21, 22}
    cfg = dataclasses.replace(
        config,
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=24),
        optim=dataclasses.replace(config.optim, max_nonfinite=2),
        train=dataclasses.replace(config.train, steps=30),
    )

    def spoiled(stream, seed, batch_size, num_steps, put):
        on_device = TokenStream(jax.numpy.asarray(stream.tokens), stream.seq_len)

        def read(first):
            block = np.stack([on_device.windows(seed, first + i, batch_size) for i in range(num_steps)])
            block[[step - 1 - first for step in bad if 0 < step - first <= num_steps], 0, 0] = (
                999  # gives logits of NaN
            )
            return WindowBlock(jax.numpy.asarray(block), jax.numpy.int32(first))

        return read

    def reported():
        lines = re.findall(
            r"^step \d+: (\d) steps? skipped, gradient not finite$", capsys.readouterr().err, re.MULTILINE
        )
        return sum(map(int, lines))

    monkeypatch.setattr(TokenStream, "feed", spoiled)
    for options, new in ({}, 6 - 1), ({"resume": True}, 1):  # the second time from step 20, the first of three in a row
        with pytest.raises(CheckError, match=r"step 22: loss nan, .* keeps its last checkpoint \(step 20\)"):
            train(cfg, out, **options)
        assert checkpoint.steps(out / "checkpoints") == [10, 20]
        assert reported() == new
    bad -= {21, 22}
    assert train(cfg, out, resume=True).step == 30
    assert reported() == 0
    logged = {row["step"]: row for row in rows(out) if "val_loss" not in row}
    assert [logged[step].get("skipped", 0) for step in (1, 5, 10, 15, 20, 25, 30)] == [0, 2, 2, 3, 4, 4, 4]
    assert logged[5].keys() == logged[20].keys() == {"step", "skipped"}
    schedule = build_schedule(cfg.optim, 30)
    for step, applied in (1, 0), (10, 7), (15, 11), (30, 25):
        assert logged[step]["lr"] == float(schedule(applied))


def test_resuming_a_finished_run_changes_no_parameter_and_no_row(config, whole, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    assert train(config, out, resume=True).step == STEPS
    assert_same_run(out, whole)


def test_a_run_goes_on_past_its_steps_when_asked(config, whole, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(whole, out)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS + 5))
    with pytest.warns(UserWarning, match="steps = 65 instead of 60: cosine ends later"):
        assert train(longer, out, resume=True).step == STEPS + 5
    assert read_config(out).train.steps == STEPS + 5


def test_fewer_steps_than_there_are_is_refused(config, whole, tmp_path):
    out = tmp_path / "shorter"
    shutil.copytree(whole, out)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS - 5))
    with pytest.raises(ValueError, match="already has 60 steps, more than steps = 55"):
        train(shorter, out, resume=True)
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_a_text_that_moved_is_known_and_one_that_changed_is_refused(config, whole, tmp_path):
    out, text = tmp_path / "moved", tmp_path / "elsewhere.txt"
    shutil.copytree(whole, out)
    shutil.copy(config.data.path, text)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(text)))
    assert train(moved, out, resume=True).step == STEPS
    losses = evaluate(load_run(out))
    text.write_text(text.read_text().replace("e", "o", 1))
    with pytest.raises(ValueError, match="the data are not those of the run"):
        train(moved, out, resume=True)
    with pytest.raises(ValueError, match="the data are not those of the run"):
        evaluate(load_run(out))
    assert losses["val_targets"] == 2999


def test_a_text_without_newlines_and_a_name_with_dollars_train_and_sample(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 40)
    short = dataclasses.replace(
        config,
        data=DataConfig(path=str(text)),
        train=dataclasses.replace(config.train, steps=6, eval_every=6, checkpoint_every=6),
    )
    train(short, tmp_path / "a$_$b")
    loaded = load_run(tmp_path / "a$_$b")
    assert sample(loaded, dataclasses.replace(loaded.config.sample, max_new_tokens=3))[0].startswith(" ")


def test_a_corpus_read_from_a_mapped_file_trains_the_same_batches(config, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path))
    mapped = dataclasses.replace(config, data=dataclasses.replace(config.data, resident_mb=0))
    train(mapped, tmp_path / "mapped")
    losses = [[row["loss"] for row in rows(out) if "loss" in row] for out in (tmp_path / "mapped", whole)]
    assert losses[0] == losses[1]


def test_a_bpe_run_loads_with_its_vocabulary(config, tmp_path):
    bpe = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer="bpe", bpe_vocab_size=300),
        train=dataclasses.replace(config.train, steps=6, eval_every=6, checkpoint_every=6),
    )
    train(bpe, tmp_path / "bpe")
    loaded = load_run(tmp_path / "bpe")
    assert loaded.config.model.vocab_size == loaded.tokenizer.vocab_size == 300
    settings = dataclasses.replace(bpe.sample, prompt="Wherefore art thou, Zoë?", max_new_tokens=5)
    assert sample(loaded, settings)[0].startswith("Wherefore art thou, Zoë?")


# A new session and a resumed one -------------------------------------------------------------------------------------


def test_a_session_is_new_or_resumed(config, whole, tmp_path):
    session = new_session(config, tmp_path / "new")
    assert (int(session.state.step), session.saved_step) == (0, None)
    assert session.config.model.vocab_size == session.corpus.tokenizer.vocab_size == 58
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "checkpoints",
        "samples",
    }
    shutil.copytree(whole, tmp_path / "resumed")
    session = resumed_session(config, tmp_path / "resumed")
    assert (int(session.state.step), session.saved_step) == (STEPS, STEPS)
    session = resumed_session(config, tmp_path / "new")  # stopped before its first checkpoint
    assert (int(session.state.step), session.saved_step) == (0, None)


def test_two_trainings_into_one_folder_are_refused_in_one_line(config, tmp_path, monkeypatch):
    def meanwhile(*arguments):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        return {}

    monkeypatch.setattr("jaxlm.run.folder.provenance", meanwhile)
    with pytest.raises(UserError, match="run was created by another process in the meantime: choose another --out"):
        train(config, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# The warm-up ---------------------------------------------------------------------------------------------------------


def shortened(config, steps, **optim):
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, max_minutes=0.0),
        optim=dataclasses.replace(config.optim, **optim),
    )


SHRINKS = "the preset's warm-up of {} steps shrinks to {}, because steps = {}"


@pytest.mark.parametrize(("steps", "warmup"), [(250, 10), (21, 0), (20, 0), (1, 0)])
def test_a_presets_own_warm_up_shrinks_with_the_steps(config, tmp_path, steps, warmup):
    tiny = shortened(config, steps, warmup_steps=20)
    with pytest.warns(UserWarning, match=SHRINKS.format(20, warmup, steps)) as said:
        train(tiny, tmp_path / "run")
    assert len(said) == 1
    assert read_config(tmp_path / "run").optim.warmup_steps == warmup
    train(tiny, tmp_path / "run", resume=True)  # the run remembers its warm-up, so nothing is said


def test_the_share_of_the_warm_up_stays(config, tmp_path):
    cpu = dataclasses.replace(preset("nanogpt-cpu"), model=config.model, data=config.data)
    with pytest.warns(UserWarning, match=SHRINKS.format(200, 20, 200)):
        train(shortened(cpu, 200), tmp_path / "a")
    train(shortened(cpu, 2000), tmp_path / "b")
    assert read_config(tmp_path / "b").optim.warmup_steps == 200
    train(shortened(cpu, 201), tmp_path / "c", keep_warmup=True)
    assert read_config(tmp_path / "c").optim.warmup_steps == 200


def test_a_warm_up_of_the_users_own_is_refused(config, tmp_path):
    with pytest.raises(
        UserError, match=r"warmup_steps = 30 is not below steps = 30: give a smaller --optim.warmup-steps"
    ):
        train(shortened(config, 30, warmup_steps=30), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_version_known_to_compute_wrong_results_is_warned_of(config, tmp_path, monkeypatch):
    monkeypatch.setitem(canary.KNOWN_WRONG, importlib.metadata.version("jaxlib"), "a report")
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    with pytest.warns(UserWarning, match=r"jaxlib \S+ computes wrong results on CPU \(a report\): install another"):
        assert train(few, tmp_path / "run").step == 6
