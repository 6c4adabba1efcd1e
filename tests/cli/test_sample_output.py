"""What `jaxlm sample` prints past the run's context, and where the locale cannot encode a text."""

import contextlib
import json
import os
import pty
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


TRAIN_AND_SAMPLE = """
import sys
from jaxlm.cli.main import main

few = "--train.steps 1 --train.batch-size 1 --train.eval-every 1 --optim.warmup-steps 0 --sample.max-new-tokens 50"
out = sys.argv[1]
trained = main(["train", "bigram", "--data.path", "text.txt", "--out", out, *few.split()])
print("between", flush=True)
sys.exit(trained or main(["sample", out]) or main(["sample", out, "--num-samples", "2"]))
"""


def test_on_a_terminal_train_and_sample_spell_out_the_escapes_of_texts_and_folders(tmp_path):
    """Without it the texts and the name of the folder would clear the screen and name the window."""
    (tmp_path / "text.txt").write_text("\x1b[2J\x07" * 2000)
    mine, its = pty.openpty()
    with (tmp_path / "stderr").open("wb") as err:
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN_AND_SAMPLE, "run\x1b[2J"],
            **{"cwd": tmp_path, "stdin": subprocess.DEVNULL, "stdout": its, "stderr": err},
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": PROGRAMS},
        )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends that nobody writes to any more
        while piece := os.read(mine, 4096):
            shown += piece
    os.close(mine)
    said = (tmp_path / "stderr").read_bytes()
    assert child.wait() == 0, said.decode()
    trained, sampled = shown.split(b"between")
    for text in (trained, sampled, sampled.split(b"---")[1], said):
        assert b"\\x1b" in text
        assert not {0x1B, 0x07} & set(text)
    for line in (b"run: run\\x1b[2J", b"more: jaxlm sample run\\x1b[2J", b"kept: run\\x1b[2J"):
        assert line in said
