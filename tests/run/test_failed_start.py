"""Out of memory before anything is compiled, in the first step, and later: one line each, and what the folder holds."""

import dataclasses

import jax
import numpy as np
import pytest
from support import refused

from jaxlm.config import DataConfig, ModelConfig
from jaxlm.config.presets import preset
from jaxlm.errors import CheckError, UserError
from jaxlm.run import failed_start, training
from jaxlm.run.failed_start import described
from jaxlm.run.folder import load_run, read_config
from jaxlm.run.session import new_session

DEVICE = "RESOURCE_EXHAUSTED: Out of memory allocating 4406428604256 bytes."


@pytest.fixture
def text(tmp_path, shakespeare):
    path = tmp_path / "text.txt"
    path.write_text(shakespeare.read_text()[:30_000])
    return path


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_compiled_or_written(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "make_chunk", lambda *_: pytest.fail("compiled"))
    line = refused("train", "tiny", "--train.batch-size", "20000000", "--data.path", text)
    assert "a training step needs about 5," in line
    assert "GB free (batch_size = 20000000, grad_accum = 1): give a smaller --train.batch-size" in line
    assert not [*(tmp_path / "runs").iterdir()]


def failing(monkeypatch, error, after):
    """Makes `loop` run out of memory once `after` steps are saved."""
    loop = training.loop

    def fails(chunk, state, source, cfg, hooks):
        if after:
            loop(chunk, state, source, dataclasses.replace(cfg, steps=after), hooks)
        raise error

    monkeypatch.setattr(training, "loop", fails)


@pytest.fixture
def config(text):
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=8),
        data=DataConfig(path=str(text)),
        optim=dataclasses.replace(tiny.optim, warmup_steps=0),
        train=dataclasses.replace(tiny.train, steps=6, eval_every=2, checkpoint_every=2),
    )


@pytest.mark.parametrize(
    ("error", "existed"),
    [(jax.errors.JaxRuntimeError(DEVICE), False), (MemoryError("7 bytes of which 1 are free"), True)],
)
def test_before_anything_is_saved_the_folder_is_free_again(config, tmp_path, monkeypatch, error, existed):
    out = tmp_path / "run"
    if existed:
        out.mkdir()
    failing(monkeypatch, error, after=0)
    with pytest.raises(UserError, match=r"out of memory: .*; nothing was saved in .*run, and it is free again: give"):
        training.train(config, out)
    assert out.exists() == existed
    assert not existed or not [*out.iterdir()]


def test_what_is_not_of_the_run_stays_and_what_cannot_be_removed_hides_no_refusal(config, tmp_path, monkeypatch):
    out, remove = tmp_path / "disk", failed_start.remove
    (out / "lost+found" / "old").mkdir(parents=True)
    (out / "lost+found" / "old" / "file").write_text("theirs")

    def refused_for_samples(path):
        if path.name == "samples":
            raise PermissionError(13, "Permission denied")
        remove(path)

    monkeypatch.setattr(failed_start, "remove", refused_for_samples)
    failing(monkeypatch, MemoryError("7 bytes of which 1 are free"), after=0)
    with pytest.raises(UserError, match="nothing was saved"):
        training.train(config, out)
    assert sorted(path.name for path in out.iterdir()) == ["lost+found", "samples"]
    assert (out / "lost+found" / "old" / "file").read_text() == "theirs"


def test_later_the_checkpoint_is_kept_and_named(config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, jax.errors.JaxRuntimeError(DEVICE), after=2)
        words = r"out of memory: 4,406.4 GB more cannot be allocated; .*run keeps its checkpoint of step 2: go on with"
        with pytest.raises(CheckError, match=words):
            training.train(config, out)
    assert load_run(out).step == 2
    assert training.train(config, out, resume=True).step == 6


def test_a_run_that_the_system_has_killed_before_its_first_save_may_take_a_smaller_batch(config, tmp_path):
    out = tmp_path / "run"
    new_session(config, out)  # and here the system ends the process
    smaller = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=4, grad_accum=2))
    assert training.train(smaller, out, resume=True).step == 6
    assert read_config(out).train.batch_size == 4
    with pytest.raises(UserError, match="was trained with train.batch_size = 4, not 8"):
        training.train(config, out, resume=True)


def test_other_errors_of_the_device_stay_what_they_are(config, tmp_path, monkeypatch):
    failing(monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: Gloo"), after=0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
        training.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()


def test_what_could_not_be_allocated_is_said():
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 60, np.int8)
    assert described(of_numpy.value) == "out of memory: 1.00 EiB more cannot be allocated"
    on_gpu = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes."
    assert described(RuntimeError(on_gpu)) == "out of memory: 12.9 GB more cannot be allocated"
    assert described(RuntimeError("RESOURCE_EXHAUSTED: no room\nfor it")) == (
        "out of memory (RESOURCE_EXHAUSTED: no room for it)"
    )
    assert described(MemoryError()) == "out of memory"
    assert described(RuntimeError("INTERNAL")) is None


def test_close_to_the_limit_the_compiled_program_is_asked(config, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "is_close", lambda cost: True)
    monkeypatch.setattr(failed_start, "FIX", "give less")
    monkeypatch.setattr("jaxlm.run.session.check_memory", lambda *_: None)
    monkeypatch.setattr("jaxlm.analysis.expected.free_memory", lambda: 10**4)
    with pytest.raises(UserError, match="out of memory: 0.* MB more cannot be allocated; nothing .* free again: give"):
        training.train(config, tmp_path / "run")
