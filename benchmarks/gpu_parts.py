"""The parts of `gpu.py`: each gives the rows of its table within a time limit."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_lanes import NEW, SIZES, last_line, reason
from gpu_race import HERE, Timing, Worker, end, race

__all__ = ["PARTS", "Row", "Session", "reason"]

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "A10": 125e12, "L4": 121e12}
"""FLOP/s of dense bfloat16 products by the makers' data sheets, SXM where there are several; TF32 has half."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    part: str
    what: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    """Speed of jaxlm over that of this contestant."""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Session:
    """What all parts know."""

    out: Path
    environment: dict[str, str]
    smoke: bool
    rounds: int
    device: str = ""

    def race(self, processes: list[tuple[str, list[str]]], seconds: float) -> dict[str, Timing]:
        """The times of lanes, given the script of each process and its lanes, by "jax" or "torch" and lane."""
        workers: list[Worker] = []
        try:
            for number, (framework, lanes) in enumerate(processes):
                log = self.out / f"{lanes[0].split(':')[0]}{number}.log"
                workers.append(Worker(f"gpu_{framework}.py", framework, lanes, self.environment, log))
            return race(workers, self.rounds, seconds)
        finally:
            for worker in workers:
                worker.close()


def _failed(part: str, what: str, why: str) -> Row:
    return Row(part, what, note=f"failed: {why}")


def _lane(kind: str, size: str, precision: str, *more: str) -> str:
    return ":".join((kind, size, precision, *more))


def train(session: Session, seconds: float) -> list[Row]:
    """Training steps: tokens/s, share of the data sheet's and of the measured peak, memory."""
    small, large = ("smoke" if session.smoke else "shakespeare-char"), "gpt2-124m"
    n = "64" if session.smoke else "8192"
    peaks = {"bfloat16": f"peak:bfloat16:{n}", "tensorfloat32": f"peak:tensorfloat32:{n}"}
    groups = [[peaks["bfloat16"], _lane("train", small, "bfloat16"), _lane("train", small, "bfloat16", "dropout")]]
    groups += [[peaks["tensorfloat32"], _lane("train", small, "tensorfloat32")], [_lane("train", small, "float32")]]
    if session.smoke:
        processes = [(framework, list(itertools.chain(*groups))) for framework in ("jax", "torch")]
    else:
        groups.insert(1, [_lane("train", large, "bfloat16")])
        # JAX compiles half a minute and more a program, so all do at once. PyTorch's precision is one for a process.
        processes = [("jax", [lane]) for lane in itertools.chain(*groups)] + [("torch", lanes) for lanes in groups]
    timings = session.race(processes, seconds)
    measured: dict[str, float] = {}
    rows = []
    for name, timing in timings.items():
        framework, kind, precision, *_ = name.split(":")
        if kind == "peak":
            if timing.median:
                flops = timing.facts["flops"] / timing.median
                measured[precision] = max(measured.get(precision, 0.0), flops)
                rows.append(Row("train", f"{framework} matmul {n} {precision}", flops / 1e12, "TFLOP/s"))
            else:
                rows.append(_failed("train", f"{framework} matmul {n} {precision}", timing.failed or "no round"))
    for name, timing in timings.items():
        if ":train:" in name:
            rows.append(_train_row(session, name, timing, timings, measured))
    return rows


def _train_row(
    session: Session, name: str, timing: Timing, timings: dict[str, Timing], measured: dict[str, float]
) -> Row:
    framework, _, size, precision, *dropout = name.split(":")
    s = SIZES[size]
    what = f"{'jaxlm' if framework == 'jax' else 'nanoGPT-like'} {size} {precision}{' dropout 0.2' if dropout else ''}"
    if timing.median is None:
        return _failed("train", what, timing.failed or "no round")
    tokens = s.batch * s.context * s.steps / timing.median
    flops = tokens * s.flops_per_token
    notes = [f"{1e3 * timing.median / s.steps:.2f} ms a step of {s.batch} x {s.context}"]
    sheet = next((peak for key, peak in PEAKS.items() if key in session.device), None)
    if sheet and precision != "float32":
        notes.append(f"MFU {flops / (sheet if precision == 'bfloat16' else sheet / 2):.1%}")
    if precision in measured:
        notes.append(f"{flops / measured[precision]:.1%} of the measured peak")
    if timing.facts.get("memory"):
        notes.append(f"{timing.facts['memory'] / 1e9:.2f} GB")
    if "note" in timing.facts:
        notes.append(timing.facts["note"])
    if timing.failed:
        notes.insert(0, f"failed: {timing.failed}")
    return Row("train", what, tokens, "tokens/s", _ratio(name, timings), "; ".join(notes))


def _ratio(name: str, timings: dict[str, Timing], ours: str | None = None) -> float | None:
    """The time of a contestant's round over that of jaxlm's round of the same work."""
    ours = ours or "jax:" + name.split(":", 1)[1]
    if name == ours or ours not in timings:
        return None
    mine, theirs = timings[ours].median, timings[name].median
    return theirs / mine if mine and theirs else None


def decode(session: Session, seconds: float) -> list[Row]:
    """Sampling at temperature 1: tokens/s of all rows together, the prompt's prefill included."""
    size, batches = ("smoke", [2]) if session.smoke else ("gpt2-124m", [1, 32, 128])
    kinds = {"eager": "Hugging Face eager", "static": "Hugging Face static cache, compiled", "graph": "CUDA graph"}
    processes = [("jax", [f"decode:{batch}:{size}"]) for batch in batches]
    if session.smoke:
        processes.append(("torch", [f"{kind}:{batch}:{size}" for kind in kinds for batch in batches]))
    else:  # each batch compiles for itself, at the same time
        processes += [("torch", [f"{kind}:{batch}:{size}" for batch in batches]) for kind in ("eager", "graph")]
        processes += [("torch", [f"static:{batch}:{size}"]) for batch in batches]
    timings = session.race(processes, seconds)
    rows = []
    for batch in batches:
        ours = f"jax:decode:{batch}:{size}"
        for name in [ours, *(f"torch:{kind}:{batch}:{size}" for kind in kinds)]:
            timing = timings[name]
            what = f"{kinds.get(name.split(':')[1], 'jaxlm')}, batch {batch}"
            if timing.median is None:
                rows.append(_failed("decode", what, timing.failed or "no round"))
                continue
            note = f"{1e3 * timing.median / NEW:.3f} ms a token of each row; ready after {timing.facts['ready_s']} s"
            note = f"failed: {timing.failed}; {note}" if timing.failed else note
            rows.append(Row("decode", what, batch * NEW / timing.median, "tokens/s", _ratio(name, timings, ours), note))
    return rows


def window(session: Session, seconds: float) -> list[Row]:
    """One attention, forward and backward: milliseconds and memory."""
    length, span = (512, 64) if session.smoke else (32768, 1024)
    lanes = {f"window:local:{length}:{span}": f"blocks, window {span}"}
    if session.smoke:
        lanes[f"window:reference:{length}:0"] = "whole mask, no window"
    else:
        lanes |= {f"window:cudnn:{length}:{width}": f"cuDNN, window {width or 'none'}" for width in (span, 0)}
    timings = session.race([("jax", list(lanes)), ("torch", [f"flash:{length}"])], seconds)
    ours = f"jax:{list(lanes)[0 if session.smoke else 1]}"
    rows = []
    for name, timing in timings.items():
        what = f"{lanes.get(name.removeprefix('jax:'), 'PyTorch flash, no window')}, {length} tokens"
        if timing.median is None:
            rows.append(_failed("window", what, timing.failed or "no round"))
            continue
        note = f"{timing.facts['memory'] / 1e6:.0f} MB; ratio to {lanes[ours.removeprefix('jax:')]}"
        rows.append(Row("window", what, 1e3 * timing.median, "ms", _ratio(name, timings, ours), note))
    return rows


def checks(session: Session, seconds: float) -> list[Row]:
    """Parity, resumption and the tests of cuDNN, side by side: none is timed."""
    python, root = sys.executable, HERE.parent
    parity = [python, "-m", "jaxlm", "parity", "--preset", "tiny", "--json"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    tests.append(str(root / "tests/ops/test_cudnn_x64.py"))
    if session.smoke:
        parity += ["--model.num-layers", "1", "--model.embed-dim", "16", "--model.max-seq-len", "8", "--draws", "1"]
        tests += ["-k", "future"]
    folder = session.out / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    commands: dict[str, tuple[list[str], Callable[[str], str]]] = {
        "parity, float32 without TF32": (parity, _parity_note),
        "parity, bfloat16": ([*parity, "--model.dtype", "bfloat16"], _parity_note),
        "resumed run, bit for bit": ([python, str(HERE / "gpu_jax.py"), "resume", str(folder)], last_line),
        "tests of cuDNN": (tests, last_line),
    }
    rows, deadline = [], time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        running = {}
        for number, (what, (command, _)) in enumerate(commands.items()):
            environment = {**session.environment, **({"JAX_ENABLE_X64": "1"} if command is tests else {})}
            streams = [
                stack.enter_context((session.out / f"check{number}.{name}").open("w+")) for name in ("out", "err")
            ]
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=root,
                stdout=streams[0],
                stderr=streams[1],
                text=True,
                start_new_session=True,
            )
            stack.callback(end, process)
            running[what] = process, streams
        for what, (process, streams) in running.items():
            try:
                code: int | None = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            for stream in streams:
                stream.seek(0)
            rows.append(_check_row(session, what, code, *(stream.read() for stream in streams), commands[what][1]))
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def _check_row(session: Session, what: str, code: int | None, out: str, err: str, note: Callable[[str], str]) -> Row:
    if code is None:
        return _failed("checks", what, "it did not end in time")
    try:
        said = note(out)
    except (ValueError, KeyError):
        said = f"{last_line(err) or last_line(out)} (exit code {code})"
        return _failed("checks", what, said)
    if "skipped" in said and not session.smoke:
        return _failed("checks", what, f"the GPU's tests were skipped: {said}")
    return Row("checks", what, note=f"passed: {said}" if code == 0 else f"failed: {said or last_line(err)}")


def _parity_note(out: str) -> str:
    found: dict[str, Any] = json.loads(out)
    where = f"{found['device']}, {found['dtype']}, products {found['precision']}"
    return f"{len(found['rows'])} quantities, JAX on {where}; PyTorch on {found['torch_device']}"


def run(session: Session, seconds: float) -> list[Row]:
    """A whole training run by the command, in bfloat16."""
    folder = session.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    preset = "tiny" if session.smoke else "shakespeare-char"
    command = [sys.executable, "-m", "jaxlm", "train", preset, "--model.dtype", "bfloat16", "--out", str(folder)]
    command += ["--train.max-minutes", f"{max(0.1, (seconds - 40) / 60):.2f}"]
    if session.smoke:
        command += ["--train.steps", "20", "--train.eval-every", "10", "--sample.max-new-tokens", "8"]
    started = time.monotonic()
    done = subprocess.run(
        command, env=session.environment, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds
    )
    (session.out / "run.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        return [_failed("run", preset, last_line(done.stderr))]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "val_loss" in row]
    best = min(losses, key=lambda row: row["val_loss"], default=None)
    step, speed = rows[-1]["step"], statistics.median(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
    shutil.copy(folder / "metrics.jsonl", session.out / "metrics.jsonl")
    shutil.rmtree(folder)
    if best is None:
        return [_failed("run", preset, f"stopped at step {step}, before its first evaluation")]
    stopped = re.search(r"stopped by \S+", done.stderr)
    note = f"best at step {best['step']} of {step}; {rows[-1]['elapsed_s']:.0f} s of training and evaluation, "
    note += f"{time.monotonic() - started:.0f} s in all; {speed:,.0f} tokens/s; nanoGPT: 1.4697"
    note = f"failed: {stopped[0]} at step {step}; {note}" if stopped else note
    return [Row("run", f"{preset}, best validation loss", best["val_loss"], "nats/token", note=note)]


PARTS: dict[str, tuple[Callable[[Session, float], list[Row]], float]] = {
    "train": (train, 180.0),
    "checks": (checks, 120.0),
    "run": (run, 180.0),
    "decode": (decode, 150.0),
    "window": (window, 40.0),
}
"""Each part and its time limit in seconds, most valuable first. Together they may need less than their limits."""
