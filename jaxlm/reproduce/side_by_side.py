"""Several rows at once, each in a process with cores of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.errors import CheckError, UserError
from jaxlm.reproduce.records import folder_of, read_record, usable_cores
from jaxlm.reproduce.rows import Experiment, Training
from jaxlm.reproduce.work import Job, StoppedError
from jaxlm.run.metrics import read_rows
from jaxlm.terminal import printable

LOG = "log.txt"
"""What a process prints; it lies beside the folder of its row."""

POLL_S = 0.2
LOOK_S, SILENCE_S = 1.0, 60.0
"""How often the metrics of running rows are read, and after how long a row without an evaluation says where it is."""


class _Running:
    """A job, its process, and what has been said of its progress."""

    def __init__(self, job: Job, process: subprocess.Popen, root: Path) -> None:
        self.job, self.process = job, process
        self._path = folder_of(root, job[0].name, job[1]) / "metrics.jsonl"
        self._evaluated, self._said_at, self._looked_at = -1, time.monotonic(), 0.0

    def report(self) -> None:
        """Says where the row is, if it has been evaluated since the last line or has been silent for long."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        rows = read_rows(self._path)
        evaluations = [row for row in rows if "val_loss" in row]
        is_new = bool(evaluations) and evaluations[-1]["step"] > self._evaluated
        if not is_new and now - self._said_at < SILENCE_S:
            return
        latest = evaluations[-1] if is_new else rows[-1] if rows else {"step": 0}
        self._said_at = now
        if is_new:
            self._evaluated = latest["step"]
        (row, seed), names = self.job, {"loss": "loss", "val_loss": "val"}
        losses = "".join(f", {name} {latest[field]:.2f}" for field, name in names.items() if field in latest)
        steps = f"/{row.config.train.steps}" if isinstance(row, Training) else ""
        print(f"{row.name}, seed {seed}: step {latest['step']}{steps}{losses}", file=sys.stderr)


def perform_all(
    experiment: Experiment, jobs: list[Job], root: Path, quick: bool, processes: int, done: Callable[[Job], None]
) -> None:
    """Does all jobs, at most `processes` at a time; a job waits for the rows that it needs.

    Says on stderr when a job starts, and of each but a quick one its evaluations, or once a minute its step.

    Args:
      done: called after each job.

    Raises:
      StoppedError: a process was ended by a signal; the others have been asked to stop too and have saved.
      UserError: a process refused its input; the message holds the last line that it printed.
      CheckError: a process failed.
    """
    waiting = [job for job in jobs if read_record(experiment, root, *job, quick) is None]
    cores = _shares(processes)
    running: dict[int, _Running] = {}
    root.mkdir(parents=True, exist_ok=True)
    with _stopped_by_signals(), _ended(running):
        while waiting or running:
            for slot in range(processes):
                job = next((job for job in waiting if _is_ready(experiment, job, root, quick)), None)
                if slot not in running and job is not None:
                    waiting.remove(job)
                    running[slot] = _Running(job, _start(experiment, job, root, quick, cores[slot]), root)
            time.sleep(POLL_S)
            for slot, row in list(running.items()):
                if row.process.poll() is None:
                    if not quick:
                        row.report()
                    continue
                del running[slot]
                _check(row.job, row.process.returncode, root)
                done(row.job)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """In this block SIGINT and SIGTERM raise StoppedError."""

    def stop(signum: int, frame: object) -> None:
        raise StoppedError(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _ended(running: dict[int, _Running]) -> Iterator[None]:
    """When this block ends, however it does, the processes are asked to save and end, and are waited for."""
    try:
        yield
    finally:
        for row in running.values():
            row.process.terminate()
        for row in running.values():
            row.process.wait()


def _is_ready(experiment: Experiment, job: Job, root: Path, quick: bool) -> bool:
    row, seed = job
    return all(read_record(experiment, root, experiment.row(name), seed, quick) is not None for name in row.needs)


def _start(experiment: Experiment, job: Job, root: Path, quick: bool, cores: set[int]) -> subprocess.Popen:
    row, seed = job
    command = [sys.executable, "-m", "jaxlm.reproduce.one", experiment.name, row.name, str(seed), str(root)]
    print(printable(f"started: {row.name}, seed {seed}; log in {_log(root, job)}"), file=sys.stderr)
    with _log(root, job).open("ab") as log, _on(cores):
        return subprocess.Popen(command + ["--quick"] * quick, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _check(job: Job, code: int, root: Path) -> None:
    if code in (-2, -15, 130, 143):
        raise StoppedError(abs(code) % 128)
    if code:
        lines = _log(root, job).read_text(encoding="utf-8", errors="replace").splitlines() or ["it printed nothing"]
        last = lines[-1].removeprefix("jaxlm: error: ")
        kind = UserError if code == 2 else CheckError
        raise kind(f"row {job[0].name}, seed {job[1]} ended with exit code {code}: {last}")


def _log(root: Path, job: Job) -> Path:
    return root / f"{folder_of(root, job[0].name, job[1]).name}-{LOG}"


def _shares(processes: int) -> list[set[int]]:
    """The cores of each process: all that this one may use, dealt out."""
    count = usable_cores()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(count))
    return [set(cores[slot::processes]) or {cores[slot % count]} for slot in range(processes)]


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Processes started in this block run on these cores, where the system can pin them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
