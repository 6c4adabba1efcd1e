"""What a run that is left alone survives: full disks, second processes, leftovers, and changes to its files."""

import dataclasses
import errno
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.config import DataConfig, ModelConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.optim import build_optimizer
from jaxlm.run import arrays, checkpoint, lock, saving
from jaxlm.run.folder import load_run
from jaxlm.run.metrics import OF_CLOCKS, read_rows
from jaxlm.run.training import train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("to be or not to be, that is the question; " * 60)
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=16, embed_dim=12),
        data=DataConfig(path=str(path)),
        optim=dataclasses.replace(tiny.optim, warmup_steps=2),
        train=dataclasses.replace(
            tiny.train, steps=12, log_every=2, eval_every=3, checkpoint_every=4, keep=9, batch_size=4
        ),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config, out)
    return out


def test_an_optimizer_with_a_random_key_saves_in_the_background_and_resumes(config, tmp_path, monkeypatch):
    """noisy_sgd holds one, as a typed key, which NumPy cannot copy."""
    optim = dataclasses.replace(config.optim, name="noisy_sgd", arguments=("key=0",))
    config = dataclasses.replace(config, optim=optim)
    threads = []
    write = saving.Saver._write
    monkeypatch.setattr(saving.Saver, "_write", lambda *args: (threads.append(1), write(*args)))
    monkeypatch.setattr(saving, "WORTH", 0.0)
    for name, minutes in (("whole", None), ("stopped", 1e-9)):
        some = dataclasses.replace(config, train=dataclasses.replace(config.train, max_minutes=minutes))
        train(some, tmp_path / name)
    assert len(threads) >= 2
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints")[-1] < 12
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    ours, theirs = opt_state(tmp_path / "stopped"), opt_state(tmp_path / "whole")
    assert any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(ours))
    jax.tree.map(np.testing.assert_array_equal, arrays.plain(ours), arrays.plain(theirs))


def opt_state(out):
    run = load_run(out, 12)
    like = jax.eval_shape(build_optimizer(run.config.optim, 12, run.params).init, run.params)
    return arrays.read(out / "checkpoints" / "12" / "opt_state", like)


def assert_same_run(out, whole):
    jax.tree.map(np.testing.assert_array_equal, load_run(out, 12).params, load_run(whole, 12).params)
    ours, theirs = (
        [{**row, **dict.fromkeys(OF_CLOCKS)} for row in read_rows(run / "metrics.jsonl")] for run in (out, whole)
    )
    assert ours == theirs
    assert [path.name for path in out.rglob(".*")] == []


def cut(whole, out, step):
    """A copy of the run that has got no further than a step."""
    shutil.copytree(whole, out)
    for later in checkpoint.steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(out / "checkpoints" / str(later))
    return out


def test_each_new_best_is_saved_where_it_is_evaluated(whole):
    """The loss falls with each evaluation, and only step 12 is a multiple of both periods."""
    assert checkpoint.steps(whole / "checkpoints") == [3, 4, 6, 8, 9, 12]
    assert load_run(whole).step == checkpoint.best_step(whole / "checkpoints") == 12


@pytest.mark.parametrize("worth", [0.0, float("inf")])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_more_space_goes_on(
    config, whole, tmp_path, monkeypatch, worth
):
    """In the background (worth nothing) the error comes at a later step or at the end."""
    monkeypatch.setattr(saving, "WORTH", worth)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil,
            "disk_usage",
            lambda place: SimpleNamespace(free=0 if (tmp_path / "run/checkpoints/6").exists() else 10**9),
        )
        words = (
            r"/8 cannot be written \(No space left on device\): it needs up to .*, 0 bytes were free; .* step 6, the"
        )
        with pytest.raises(UserError, match=words):
            train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [3, 4, 6]
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_save_that_fails_in_the_background_ends_the_run(config, tmp_path, monkeypatch):
    write = arrays.write

    def fail(path, tree):
        if "checkpoints/.12." in str(path):
            raise OSError(errno.EIO, "Input/output error")
        write(path, tree)

    monkeypatch.setattr(saving, "WORTH", 0.0)
    monkeypatch.setattr(arrays, "write", fail)
    with pytest.raises(UserError, match=r"12 cannot be written \(Input/output error\)"):
        train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [3, 4, 6, 8, 9]
    assert list((tmp_path / "run").rglob("*.partial")) == []


def test_resuming_sweeps_and_no_second_process_resumes(config, whole, tmp_path):
    out = cut(whole, tmp_path / "run", 8)
    (out / "checkpoints/.9.77.partial/params").mkdir(parents=True)
    (out / lock.NAME).write_text("of a killed process")
    with lock.held(out):
        before = sorted(out.rglob("*"))
        with pytest.raises(UserError, match=r"run is in use: process \d+ on .* trains it; wait for that process"):
            train(config, out, resume=True)
        assert sorted(out.rglob("*")) == before
    train(config, out, resume=True)
    assert_same_run(out, whole)


def test_changed_rows_are_refused_and_lost_ones_are_told(config, whole, tmp_path):
    out = cut(whole, tmp_path / "run", 8)
    log = out / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"step": 4', '"step": 5', 1))
    with pytest.raises(UserError, match=r"metrics.jsonl was changed after it was written"):
        train(config, out, resume=True)
    log.unlink()
    with pytest.warns(
        UserWarning, match=r"metrics.jsonl is missing: the rows of the sessions before this one are lost"
    ):
        train(config, out, resume=True)
    log.write_text(text)
    shutil.rmtree(out / "checkpoints")
    with pytest.warns(UserWarning, match="run has no checkpoint: the run begins again with step 1"):
        train(config, out, resume=True)
    assert_same_run(out, whole)


def test_what_is_no_run_gets_no_lock(config, tmp_path):
    with pytest.raises(UserError, match="is not a run: it has no config.json"):
        train(config, tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []
