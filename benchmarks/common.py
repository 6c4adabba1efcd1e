"""What the benchmarks share: contestants in processes of their own that take turns, their ratios, the device's name.

A benchmark starts one worker for each contestant: its own script once more, with `--worker SPEC`. The two exchange
lines of JSON over pipes. A worker imports, compiles and warms up when it is asked the first time; later it waits
without work while the others have their turn, because two thread pools in one process, or at one time, disturb one
another. So the parent imports neither JAX nor PyTorch.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jaxlm.config import ModelConfig

Reply = dict[str, Any]


class UnavailableError(Exception):
    """A contestant that cannot run here; the text is the reason."""


class Worker:
    """One contestant in a process of its own, on the CPU."""

    def __init__(self, script: str, **spec: Any) -> None:
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.idle_seconds = self.idle_cpu_seconds = 0.0

    def ask(self, **request: Any) -> Reply:
        """What the worker answers.

        Raises:
          UnavailableError: it failed, or its process ended.
        """
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise UnavailableError(f"its process ended with code {code}: {last}")
        reply = json.loads(line)
        if "error" in reply:
            raise UnavailableError(reply["error"])
        self.idle_seconds += reply.pop("idle_seconds")
        self.idle_cpu_seconds += reply.pop("idle_cpu_seconds")
        return reply

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def serve(prepare: Callable[..., Callable[..., Reply]], spec: str) -> None:
    """A worker's side: `prepare(**spec)` gives the function that answers every request."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    answer, waiting, used = None, time.perf_counter(), time.process_time()
    while line := sys.stdin.readline():
        idle = {"idle_seconds": time.perf_counter() - waiting, "idle_cpu_seconds": time.process_time() - used}
        try:
            answer = answer or prepare(**json.loads(spec))
            reply = {**answer(**json.loads(line)), **idle}
        except Exception as error:
            first = (str(error).strip().splitlines() or ["it gave no reason"])[0]
            reply = {"error": f"{type(error).__name__}: {first[:200]}"}
        print(json.dumps(reply), file=replies, flush=True)
        waiting, used = time.perf_counter(), time.process_time()


@contextlib.contextmanager
def started(
    script: str, specs: dict[str, Reply], requests: dict[str, Sequence[Reply]], what: str
) -> Iterator[tuple[dict[str, Worker], dict[str, list[Reply]], dict[str, str]]]:
    """Workers that have compiled and warmed up, one after another; they end with the `with` block.

    Args:
      specs: of each worker, by its name.
      requests: what each is asked first.

    Yields: the workers that answered, their answers, and for each one that failed the reason.
    """
    workers: dict[str, Worker] = {}
    answers: dict[str, list[Reply]] = {}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name, spec in specs.items():
            progress(f"{what}: {name} compiles and warms up")
            worker = Worker(script, **spec)
            stack.callback(worker.close)
            begun = time.perf_counter()
            try:
                answers[name] = [worker.ask(**request) for request in requests[name]]
                answers[name][0]["ready_seconds"] = time.perf_counter() - begun
                workers[name] = worker
            except UnavailableError as error:
                failed[name] = str(error)
        yield workers, answers, failed


def take_turns(
    workers: dict[str, Worker], requests: dict[str, Sequence[dict[str, Any]]], rounds: int
) -> tuple[dict[str, list[list[Reply]]], dict[str, str]]:
    """In each round every worker answers all its requests, and another worker begins.

    Returns:
      For each worker its replies, [rounds][requests], and for each one that failed the reason instead.
    """
    replies: dict[str, list[list[Reply]]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for i in range(rounds):
        names = list(replies)
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                replies[name].append([workers[name].ask(**request) for request in requests[name]])
            except UnavailableError as error:
                failed[name] = str(error)
                del replies[name]
    return replies, failed


def speed_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times as fast ours is, pair by pair: their time by our time in the same round."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """The median of the values, times `scale`, and in brackets the least and the most."""
    middle, least, most = (f"{scale * f(values):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({least} to {most})"


def idle_line(workers: dict[str, Worker]) -> str:
    """How much the waiting workers disturbed the one whose turn it was."""
    shares = {name: w.idle_cpu_seconds / w.idle_seconds for name, w in workers.items() if w.idle_seconds}
    name, share = max(shares.items(), key=lambda item: item[1], default=("none", 0.0))
    return f"waiting workers used at most {share:.1%} of a core ({name})"


def train_flops_per_token(cfg: ModelConfig) -> float:
    """Floating-point operations of a training step for each token: 6 N + 12 N_heads H min(T, W) a layer.

    N counts the weights of matrix products, the head's included. Scores that a causal mask hides count too.
    """
    from jaxlm.analysis.costs import parameter_table  # imports JAX, which the parent of workers must not

    lookups = {"position_embedding"} if cfg.tie_embeddings else {"position_embedding", "embedding"}
    weights = sum(count for path, shape, count in parameter_table(cfg) if len(shape) > 1 and path not in lookups)
    keys = sum(min(cfg.max_seq_len, window or cfg.max_seq_len) for window in cfg.layer_windows)
    return 6 * weights + 12 * cfg.num_heads * cfg.resolved.head_dim * keys


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(*packages: str) -> Reply:
    """Device, versions and load of the machine: what a report of times must name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {"processor": processor(), "cores": cores, "load": round(load, 2), "versions": versions(*packages)}


def environment_lines(found: Reply) -> str:
    """The same as two lines of text."""
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['processor']}, {found['cores']} cores, load average at the start {found['load']}\n{named}, float32"


def progress(text: str) -> None:
    """Says on stderr what is going on; stdout is the report."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: str | None, report: Reply) -> None:
    """Writes the report, if a file was given."""
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
