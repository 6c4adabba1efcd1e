"""Runs that are stopped, killed, damaged and resumed. The processes are real ones."""

import dataclasses
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
from jaxlm.data.batches import host_windows
from jaxlm.errors import CheckError
from jaxlm.evals.loss import evaluate
from jaxlm.optim import build_schedule
from jaxlm.run import checkpoint
from jaxlm.run.folder import load_run, read_config
from jaxlm.run.samples import sample
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
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("elapsed_s", "tokens_per_s")} for row in found]


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


def test_killed_three_times_and_resumed_a_run_is_bitwise_the_uninterrupted_one(config, whole, tmp_path):
    out = tmp_path / "killed"
    for kill, wanted in enumerate((10, 20, 40)):
        process = start(config, out, *(["--resume"] if kill else []))
        # The second kill comes in the middle of a save, the others between two.
        sign = out / "checkpoints" / (f".{wanted}.partial" if kill == 1 else str(wanted))
        wait_for(process, sign.exists)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert max(checkpoint.steps(out / "checkpoints")) < STEPS
    process = start(config, out, "--resume")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert_same_run(out, whole)


@pytest.mark.parametrize(
    ("base", "options", "kept"),
    [
        (
            "chargpt",
            "sgd --optim.arguments momentum=0.9 nesterov=true",
            {"arguments": ("momentum=0.9", "nesterov=true")},
        ),
        ("chargpt", "adamsn --optim.subset per_input", {"b2": 0.95, "subset": "per_input"}),
        ("chargpt", "adafactor", {"b2": 0.95}),
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
    train = dataclasses.replace(config.train, steps=12, eval_every=12, checkpoint_every=6)
    model = ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=24, tie_embeddings=False)
    factored = dataclasses.replace(config, model=model, optim=optim, train=train)
    train(factored, tmp_path / "whole")
    assert read_config(tmp_path / "whole").optim == optim
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/12")
    train(read_config(tmp_path / "resumed"), tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", 12)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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
    with pytest.warns(UserWarning, match="60 is damaged: its manifest cannot be read"):
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

    def spoiled(corpus, config):
        def windows(first, stop):
            made = host_windows(corpus.train, 0, first, 5, 8, 32).astype(np.int32)
            made[[step - 1 - first for step in bad if 0 < step - first <= 5], 0, 0] = 999  # gives logits of NaN
            return jax.numpy.asarray(made)

        return windows

    def told():
        lines = re.findall(
            r"^step \d+: (\d) steps? skipped, gradient not finite$", capsys.readouterr().err, re.MULTILINE
        )
        return sum(map(int, lines))

    monkeypatch.setattr("jaxlm.run.training._source", spoiled)
    for options, new in ({}, 6 - 1), ({"resume": True}, 1):  # the second time from step 20, the first of three in a row
        with pytest.raises(CheckError, match=r"step 22: loss nan, .* keeps its last checkpoint \(step 20\)"):
            train(cfg, out, **options)
        assert checkpoint.steps(out / "checkpoints") == [10, 20]
        assert told() == new
    bad -= {21, 22}
    assert train(cfg, out, resume=True).step == 30
    assert told() == 0
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


@pytest.mark.parametrize("line", ["x{}", "5", '{"loss": 1}'])
def test_a_damaged_row_is_named_and_nothing_is_dropped(config, whole, tmp_path, line):
    out = tmp_path / "rows"
    shutil.copytree(whole, out)
    rest = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(line + "\n" + rest)
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is not a row"):
        train(config, out, resume=True)
    assert (out / "metrics.jsonl").read_text() == line + "\n" + rest
    (out / "metrics.jsonl").write_text(rest + '{"step": 60, "lo')
    train(config, out, resume=True)
    assert (out / "metrics.jsonl").read_text() == rest


def test_a_tokenizer_of_another_size_is_refused(whole, tmp_path):
    out = tmp_path / "other"
    shutil.copytree(whole, out)
    (out / "tokenizer.json").write_text('{"type": "char", "chars": "ABC"}')
    with pytest.raises(ValueError, match="has 3 entries, the model 58"):
        load_run(out)


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
    sample = dataclasses.replace(bpe.sample, prompt="Wherefore art thou, Zoë?", max_new_tokens=5)
    assert sample(loaded, sample)[0].startswith("Wherefore art thou, Zoë?")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there cuDNN is at hand")
def test_a_run_of_a_gpu_opens_elsewhere_with_a_warning(whole, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(whole, out)
    record = json.loads((out / "config.json").read_text())
    record["config"]["model"] |= {"attention_impl": "cudnn", "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="trained with cuDNN's attention, which needs an NVIDIA GPU: using 'auto'"):
        opened = load_run(out)
    assert opened.model.cfg.attention_impl == "auto"
