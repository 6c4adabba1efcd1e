"""What `jaxlm sample` prints past the run's context, and where the locale cannot encode a text."""

import os
import subprocess
import sys
import warnings

import jax
import pytest
from checking import PROGRAMS
from support import built, command

from jaxlm.config import ExperimentConfig, ModelConfig, SampleConfig
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.run import checkpoint
from jaxlm.run.folder import new_folder
from jaxlm.training.step import TrainState

CHARACTERS = "äöüß│█é"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was never trained, of a text without ASCII; its samples are longer than its position table."""
    out = tmp_path_factory.mktemp("work") / "run"
    cfg = ModelConfig(
        vocab_size=len(CHARACTERS), max_seq_len=16, num_layers=1, embed_dim=8, num_heads=2, position="learned"
    )
    config = ExperimentConfig(preset="test", model=cfg, sample=SampleConfig(prompt="ä", max_new_tokens=30))
    with new_folder(out, config, CharTokenizer(CHARACTERS), "0" * 64) as aside:
        checkpoint.save(aside / "checkpoints", TrainState(built(cfg)[1], (), jax.numpy.int32(3)), None, keep=1)
    return out


def test_the_runs_own_length_passes_its_table_without_a_warning(run):
    code, out, err = command("sample", run)
    assert (code, len(out)) == (0, 1 + 30 + 1)
    assert "warning" not in err
    assert "warning" not in command("sample", run, "--num-samples", 3, "--seed", 1)[2]


def test_a_length_that_is_asked_for_is_warned_of(run):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a test has them raised
        code, out, err = command("sample", run, "--max-new-tokens", 20)
    assert (code, len(out)) == (0, 1 + 20 + 1)
    assert "jaxlm: warning: prompt 1 + 20 new tokens pass the learned position table (capacity 16" in err
    assert "warning" not in command("sample", run, "--max-new-tokens", 15)[2]


def test_what_the_locale_cannot_encode_is_replaced(run):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "JAX_COMPILATION_CACHE_DIR": PROGRAMS}
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", "sample", str(run)], env={**os.environ, **locale}, capture_output=True
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"?" * 31 + b"\n"
