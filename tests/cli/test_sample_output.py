"""What `jaxlm sample` prints past the run's context, and where the locale cannot encode a text."""

import json
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
    return untrained(tmp_path_factory.mktemp("work") / "run", "learned")


def untrained(out, position):
    """The run at `out`."""
    cfg = ModelConfig(
        vocab_size=len(CHARACTERS), max_seq_len=16, num_layers=1, embed_dim=8, num_heads=2, position=position
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


def test_a_rotary_model_warns_past_its_context_and_takes_a_capacity(tmp_path):
    """A prompt that passes it is a choice, whatever the length; the run's own length is not."""
    out = untrained(tmp_path / "run", "rope")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a test has them raised
        assert "warning" not in command("sample", out)[2]
        long = command("sample", out, "--prompt", "ä" * 24, "--json")
        assert "warning: prompt 24 + 30 new tokens pass the context of the model (capacity 16" in long[2]
        assert "warning: prompt 1 + 20 new tokens pass" in command("sample", out, "--max-new-tokens", 20)[2]
        wide = command("sample", out, "--prompt", "ä" * 24, "--json", "--capacity", 53)
    assert "warning" not in wide[2]
    seen, more = json.loads(long[1]), json.loads(wide[1])
    assert "capacity" not in seen
    assert more["capacity"] == 53
    assert seen["samples"][0]["log_probs"] != more["samples"][0]["log_probs"]
    assert "capacity = 0: give a whole number of at least 1" in command("sample", out, "--capacity", 0)[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sample.temperature", "1e-9"], "temperature = 1e-09 is out of range: give 0 (greedy), or a finite number"),
        (["--sample.forbidden-tokens", "999"], "forbidden_tokens holds 999: the vocabulary has 0 to"),
        (["--sample.stop-token", "999"], "stop_token = (999,): the vocabulary has 0 to"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_training(folder, options, words):
    few = ["train", "tiny", "--data.path", "text.txt", "--out", "refused", "--optim.warmup-steps", "2"]
    code, out, err = command(*few, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert "step 1/" not in err
    assert not (folder / "refused").exists()


def test_what_the_locale_cannot_encode_is_replaced(run):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "JAX_COMPILATION_CACHE_DIR": PROGRAMS}
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", "sample", str(run)], env={**os.environ, **locale}, capture_output=True
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"?" * 31 + b"\n"
