"""Saving in the background, and on disks that are full. What saves write is tested in test_checkpoint.py."""

import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.run import checkpoint, manifest, saving
from jaxlm.run.manifest import Loss
from jaxlm.run.saving import Saver
from jaxlm.training.step import TrainState


def state(step):
    params = {"w": jnp.arange(30.0) * step, "b": jnp.full(3, step, jnp.bfloat16)}
    return TrainState(params, (jnp.ones(4),), jnp.int32(step))


def restored(folder, step):
    return checkpoint.restore_latest(folder, state(0))[0] if checkpoint.steps(folder)[-1] == step else None


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_the_first_save_is_awaited_and_those_after_it_run_beside_training_where_that_pays(tmp_path):
    with Saver(tmp_path, keep=3) as saver:
        assert not saver.background
        saver.save(state(1), Loss(2.0))
        assert checkpoint.steps(tmp_path) == [1]
        assert saver.background  # nothing was done but saving


def test_where_saving_takes_little_time_it_is_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "WORTH", 1e9)
    with Saver(tmp_path, keep=3) as saver:
        saver.save(state(1), None)
        assert not saver.background


def test_a_save_in_the_background_is_that_of_its_moment(tmp_path, monkeypatch):
    """The arrays are donated to the next step, so they are copied; so is what is said of metrics.jsonl."""
    begin, save, log = threading.Event(), checkpoint.save, {"bytes": 1, "sha256": "a"}
    monkeypatch.setattr(checkpoint, "save", lambda *args: (begin.wait(60), save(*args)))
    with Saver(tmp_path, 3, lambda: log) as saver:
        saver.background, now = True, state(5)
        saver.save(now, Loss(1.5))
        assert checkpoint.steps(tmp_path) == []
        saver.check()  # nothing has failed
        jax.tree.map(lambda leaf: leaf.delete(), now)  # as donation does
        log = {"bytes": 2, "sha256": "b"}
        begin.set()
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path, 5), state(5))
    assert manifest.read(tmp_path / "5")["metrics"] == {"bytes": 1, "sha256": "a"}
    assert checkpoint.best_loss(tmp_path) == Loss(1.5)


def test_the_error_of_a_save_in_the_background_comes_at_the_next_step_and_at_the_end(tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", fail)
    saver = Saver(tmp_path, keep=3)
    saver.background = True
    saver.save(state(1), None)
    saver._thread.join()
    with pytest.raises(UserError, match="the disk is full"):
        saver.check()
    saver.check()  # said once
    with pytest.raises(UserError, match="the disk is full"), saver:
        saver.save(state(2), None)


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(4), None, 3)
    before = files(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    words = (
        r"/5 cannot be written \(No space left on device\): it needs up to 65.7 kB, 1.23 kB were free; "
        "free some space, and go on with --resume from step 4, the last good one"
    )
    with pytest.raises(UserError, match=words):
        checkpoint.save(tmp_path, state(5), None, 3)
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="were free; free some space, and no step is saved yet"):
        checkpoint.save(tmp_path / "new", state(5), None, 3)


LIMITED = """
import json, resource, sys
from pathlib import Path
import jax, numpy as np
from jaxlm.errors import UserError
from jaxlm.run import checkpoint
from jaxlm.training.step import TrainState
folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
params = {f"w{i}": jax.numpy.asarray(rng.normal(size=50_000), "float32") for i in range(30)}
small = TrainState({"w": params["w0"][:9]}, (), jax.numpy.int32(1))
checkpoint.save(folder, small, None, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(folder, TrainState(params, (), jax.numpy.int32(2)), None, 2)
except UserError as error:
    print(json.dumps(str(error)))
"""


def test_a_write_that_the_file_system_refuses_is_one_error_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for a disk that fills up although there was space: both fail in a write."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    words = json.loads(done.stdout)
    assert "2 cannot be written (File too large): it needs up to 6.07 MB" in words
    assert "go on with --resume from step 1, the last good one" in words
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
