"""The runner of benchmarks/gpu.py: rows whatever happens, results kept, wheels for what is missing."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

BENCHMARKS = Path(jaxlm.__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_lanes  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_wheels  # noqa: E402
from gpu_parts import Row, Session  # noqa: E402
from gpu_race import Timing, Worker, race  # noqa: E402

LANES = """
import os, sys, time
sys.path.append({folder!r})
import gpu_lanes
count = 0
def late():
    global count
    count += 1
    if count == 3:
        raise ValueError("too late")
def make(lane):
    if lane == "broken":
        raise ValueError("no such lane")
    if lane == "slow":
        time.sleep(60)
    if lane == "dying":
        sys.exit("out of luck")
    print("what a library prints")
    return (late if lane == "late" else lambda: time.sleep(0.01)), {{"memory": 5}}
gpu_lanes.serve(sys.argv[1:], make)
"""


@pytest.fixture
def start(tmp_path):
    script, workers = tmp_path / "lanes.py", []
    script.write_text(LANES.format(folder=str(BENCHMARKS)))

    def started(name, *lanes):
        workers.append(Worker(str(script), name, list(lanes), dict(os.environ), tmp_path / f"{name}.log"))
        return workers[-1]

    yield started
    for worker in workers:
        worker.close()


def test_a_lane_that_fails_says_why_and_the_others_go_on(start):
    timings = race([start("a", "broken", "good", "late"), start("b", "good", "dying")], 3, 30.0)
    assert {name: timing.failed for name, timing in timings.items()} == {
        "a:broken": "ValueError: no such lane",
        "a:good": None,
        "a:late": "ValueError: too late",
        "b:good": "the process ended with code 1: out of luck",
        "b:dying": "the process ended with code 1: out of luck",
    }
    assert [len(timing.seconds) for timing in timings.values()] == [0, 3, 1, 0, 0]
    assert timings["a:good"].median >= 0.01
    assert timings["a:good"].facts["memory"] == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Traceback\nValueError: odd\n--------------------\nFor simplicity, JAX has removed its frames.\n",
            "ValueError: odd",
        ),
        ("one\ntwo\n\n", "two"),
        ("", ""),
    ],
)
def test_what_an_error_says_is_not_the_note_behind_it(text, said):
    assert gpu_lanes.last_line(text) == said


def test_a_process_that_is_not_ready_in_time_is_ended(start):
    worker = start("a", "good", "slow")
    timings = race([worker, start("b", "good")], 1, 5.0)
    assert [timing.failed for timing in timings.values()] == ["slow was not ready in time"] * 2 + [None]
    assert worker._process.poll() is not None


def session(tmp_path, **fields):
    return Session(**{"out": tmp_path, "environment": {}, "smoke": True, "rounds": 1, **fields})


def test_results_are_kept_after_each_part_and_an_error_is_a_row(tmp_path, monkeypatch, capsys):
    def kept(session, seconds):
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        return [Row("second", f"{len(rows)} before", 2.0, "ms", 0.5)]

    def failing(session, seconds):
        raise RuntimeError("no luck")

    parts = {"first": (lambda s, seconds: [Row("first", f"{seconds:.0f} s")], 5.0), "second": (kept, 5.0)}
    parts |= {"third": (failing, 5.0), "fourth": (kept, 500.0)}
    monkeypatch.setattr(gpu_parts, "PARTS", parts)
    rows = gpu.run_parts(session(tmp_path, smoke=False), list(parts), 100.0, {"device": "none"})
    assert [(row.what, row.note) for row in rows] == [
        ("5 s", ""),
        ("1 before", ""),
        ("all", "failed: RuntimeError: no luck"),
        ("all", "failed: 100 s of 100 s were left"),
    ]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["device"] == "none"
    assert len(found["rows"]) == 4
    assert "second  1 before  2      ms    0.50" in capsys.readouterr().out


def test_shares_of_the_peak_and_ratios_are_of_the_same_work(tmp_path):
    small = gpu_lanes.SIZES["shakespeare-char"]
    tokens = small.batch * small.context * small.steps
    lanes = {
        "jax:train:shakespeare-char:bfloat16": Timing([1.0, 2.0, 9.0], {"memory": 5e9, "note": "attention cudnn"}),
        "torch:train:shakespeare-char:bfloat16": Timing([4.0], {}),
        "torch:train:shakespeare-char:float32": Timing([4.0], {}),
    }
    on = session(tmp_path, device="NVIDIA H100 80GB HBM3")
    rows = [gpu_parts._train_row(on, name, t, lanes, {"bfloat16": 500e12}) for name, t in lanes.items()]
    assert [row.value for row in rows] == [tokens / 2, tokens / 4, tokens / 4]
    assert [row.ratio for row in rows] == [None, 2.0, None]
    flops = tokens / 2 * small.flops_per_token
    assert (
        f"MFU {flops / 989e12:.1%}; {flops / 500e12:.1%} of the measured peak; 5.00 GB; attention cudnn" in rows[0].note
    )
    assert "MFU" not in rows[2].note


def test_the_sizes_are_those_of_the_models():
    large = gpu_lanes.SIZES["gpt2-124m"]
    assert large.parameters / 1e6 == pytest.approx(123.6, abs=0.1)
    assert large.flops_per_token / large.parameters == pytest.approx(6.9, abs=0.1)


def test_a_check_that_skips_the_gpus_tests_there_has_failed(tmp_path):
    arguments = ("tests of cuDNN", 0, "10 passed, 9 skipped in 3 s", "", gpu_lanes.last_line)
    assert gpu_parts._check_row(session(tmp_path), *arguments).note.startswith("passed")
    assert gpu_parts._check_row(session(tmp_path, smoke=False), *arguments).note.startswith("failed")
    ended = gpu_parts._check_row(session(tmp_path), "parity", 2, "", "no\ntorch", gpu_parts._parity_note)
    assert ended.note == "failed: torch (exit code 2)"


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert "gpu.py: error: nvidia-smi names no GPU" in done.stderr


def test_wheels_are_those_of_the_machines_python_and_the_pinned_versions():
    carried = gpu_wheels.carried()
    assert {"flax==0.12.12", "tyro==1.0.17", "einops==0.8.2", "hatchling"} <= set(carried)
    assert not any(line.startswith(("jax==", "numpy", "torch")) for line in carried)


def test_only_what_is_missing_or_out_of_bounds_is_installed(tmp_path, monkeypatch):
    here = {"flax": "0.12.9", "optax": "0.2.7", "jax": "0.11.2"}

    def version(name):
        if name not in here:
            raise importlib.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    needed = {requirement.name for requirement in gpu_wheels.requirements()}
    for name in (needed | {"mdurl"}) - {"jax", "jaxlib", "pytest-xdist"}:
        (tmp_path / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").touch()
    with pytest.raises(LookupError, match=r"^jaxlib!=0.10.2,<0.13,>=0.10.1 missing here and in "):
        gpu_wheels.missing(tmp_path)
    here["jaxlib"] = "0.11.2"
    names = {path.name.split("-")[0] for path in gpu_wheels.missing(tmp_path)}
    assert {"optax", "tyro", "mdurl"} <= names
    assert not names & {"flax", "jax", "jaxlib"}
