"""The benchmarks: the arithmetic of their ratios and fits, workers that fail, and that growing.py runs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxlm

FOLDER = Path(jaxlm.__file__).parent.parent / "benchmarks"


@pytest.fixture
def common(monkeypatch):
    """The names of benchmarks/common.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "common.py"))


@pytest.fixture
def growing(monkeypatch):
    """The names of benchmarks/growing.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "growing.py"))


class Recorded:
    """A worker that answers with the numbers given, then fails."""

    def __init__(self, name, seconds, asked, error):
        self.name, self.seconds, self.asked, self.error = name, list(seconds), asked, error

    def ask(self, steps):
        self.asked.append(self.name)
        if not self.seconds:
            raise self.error("it has no more numbers")
        return {"seconds": self.seconds.pop(0) * steps}


def test_ratios_compare_the_times_of_one_round(common):
    ours, theirs = [1.0, 2.0, 4.0], [2.0, 3.0, 4.0]
    ratios = common["speed_ratios"](ours, theirs)
    assert ratios == [2.0, 1.5, 1.0]
    # The median of the ratios is 1.5; the ratio of the medians happens to be that too, that of other rounds is not.
    assert common["speed_ratios"](ours, theirs[::-1]) == [4.0, 1.5, 0.5]
    assert common["spread"](ratios, 2) == "1.50 (1.00 to 2.00)"
    assert common["spread"]([0.0125, 0.25], 1, 1e3) == "131.2 (12.5 to 250.0)"
    with pytest.raises(ValueError, match="shorter"):
        common["speed_ratios"](ours, theirs[:2])


def test_workers_take_turns_and_one_that_fails_leaves_the_others(common):
    asked = []
    times = {"a": [1, 2, 3], "b": [4], "c": [5, 6, 7]}
    workers = {name: Recorded(name, values, asked, common["UnavailableError"]) for name, values in times.items()}
    requests = {name: [{"steps": 10}] for name in workers}
    replies, failed = common["take_turns"](workers, requests, 3)
    assert asked == ["a", "b", "c", "b", "c", "a", "a", "c"]
    assert replies == {"a": [[{"seconds": s}] for s in (10, 20, 30)], "c": [[{"seconds": s}] for s in (50, 60, 70)]}
    assert failed == {"b": "it has no more numbers"}


WORKER = """
import os, sys
from common import serve

def prepare(factor):
    print("what a library prints on stdout is no reply")

    def answer(x):
        if x == 3:
            os._exit(5)
        return {"product": factor * x, "share": 6 / x}

    return answer

serve(prepare, sys.argv[sys.argv.index("--worker") + 1])
"""


def test_a_worker_answers_and_says_why_it_does_not(common, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), *sys.path]))
    worker = common["Worker"](str(script), factor=7)
    assert worker.ask(x=2) == {"product": 14, "share": 3.0}
    with pytest.raises(common["UnavailableError"], match="^ZeroDivisionError: division by zero$"):
        worker.ask(x=0)
    assert worker.ask(x=6)["product"] == 42
    assert worker.idle_seconds > worker.idle_cpu_seconds >= 0
    with pytest.raises(common["UnavailableError"], match="^its process ended with code 5: what a library prints"):
        worker.ask(x=3)
    with pytest.raises(common["UnavailableError"], match="^its process ended with code 5"):
        worker.ask(x=1)
    worker.close()


def test_training_flops_are_those_of_the_formula(common):
    model = {"vocab_size": 11, "max_seq_len": 7, "num_layers": 2, "embed_dim": 6, "num_heads": 3}
    weights = 2 * 12 * 6**2 + 11 * 6  # a GPT-2 block has 12 D^2; the head
    flops = common["train_flops_per_token"]
    assert flops(jaxlm.ModelConfig(**model)) == 6 * weights + 12 * 2 * 6 * 7
    assert flops(jaxlm.ModelConfig(tie_embeddings=False, window=(3, None), **model)) == 6 * weights + 12 * 6 * (3 + 7)


def test_a_fit_finds_the_terms_that_made_the_times(growing):
    rng = np.random.default_rng(0)
    flops, moved = rng.uniform(1e8, 1e11, 12), rng.uniform(1e6, 1e9, 12)
    for terms in ((1e-3, 5e-12, 4e-11), (0, 5e-12, 4e-11), (1e-3, 0, 4e-11), (1e-3, 5e-12, 0)):
        true = growing["Fit"](*terms)
        np.testing.assert_allclose(growing["fit"](true.seconds(flops, moved), flops, moved), true, 1e-6, 1e-18)
    falling = growing["fit"](1 / flops, flops, moved)  # least squares alone would make the FLOPs' term negative
    assert min(falling) == 0


@pytest.mark.slow
def test_growing_writes_its_table_and_picture(tmp_path):
    picture, numbers = tmp_path / "growing.png", tmp_path / "growing.json"
    command = [sys.executable, str(FOLDER / "growing.py"), "--smoke", "--figure", str(picture), "--json", str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(numbers.read_text())
    assert len(report["sizes"]) == 5
    assert {row["width"] for row in report["sizes"]} == {32, 64}
    assert all(len(row["seconds"]) == 1 for row in report["sizes"])
    assert "a step takes" in done.stdout
    assert "time grows as context^" in done.stdout


PROGRAM = """
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  ROOT %scaled = f32[2] multiply(%p, %p), metadata={op_name="jit(chunk)/jvp(Transformer)/block_0/mlp/up/mul"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %fusion.1 = f32[2] fusion(%x), kind=kLoop, calls=%fused
  ROOT %dot.2 = f32[2] dot(%x), metadata={op_name="transpose(jvp(Transformer))/block_0/attention/query/dot_general"}
}
"""


def test_operations_of_a_profile_are_given_to_the_parts_of_the_model(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    profile = runpy.run_path(str(FOLDER / "profile_step.py"))
    names = profile["origins"](PROGRAM)
    assert profile["part_of"](names["fusion.1"]) == "MLP, forward"
    assert profile["part_of"](names["dot.2"]) == "projections of attention, backward"
    assert profile["part_of"]("jit(chunk)/while/body/adamw/mul") == "embeddings, optimizer, other"
