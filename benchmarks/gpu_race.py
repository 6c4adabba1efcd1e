"""Processes that take turns on one device, for `gpu.py`."""

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_lanes import PREFIX, last_line

HERE = Path(__file__).parent
READY = 0.8
"""Share of the time in which processes must be ready."""


class Timing(NamedTuple):
    """What a lane took, or why it has no time."""

    seconds: list[float]
    facts: dict[str, Any]
    failed: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds of a round."""
        return statistics.median(self.seconds) if self.seconds else None


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process that was started in a session of its own, and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A process with some lanes."""

    def __init__(self, script: str, name: str, lanes: list[str], environment: dict[str, str], log: Path) -> None:
        """Args: name: begins the names of its lanes in `race`."""
        self.name, self.lanes, self._answers = name, lanes, queue.Queue[dict[str, Any] | None]()
        self._log, self._noise = log.open("w+"), log.with_suffix(".out").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *lanes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                self._answers.put(json.loads(line[len(PREFIX) :]))
            else:
                self._noise.write(line)
        self._answers.put(None)

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """The next answer; None if the time is over.

        Raises:
          ConnectionError: the process has ended.
        """
        try:
            found = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if found is None:
            self._answers.put(None)
            self._log.seek(0)
            said = last_line(self._log.read()) or "it said nothing"
            raise ConnectionError(f"the process ended with code {self._process.wait()}: {said}")
        return found

    def ask(self, lane: str) -> None:
        """Starts a round."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{lane}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Ends the process."""
        end(self._process)
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._log, self._noise):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def race(workers: list[Worker], rounds: int, seconds: float) -> dict[str, Timing]:
    """Builds all lanes, the processes at the same time, then runs rounds of each lane in turn.

    The names of lanes begin with those of their processes: jax:peak:bfloat16:64. A process whose lanes are not all
    ready after READY of the time is left out. Every lane has an entry.
    """
    started = time.monotonic()
    timings: dict[str, Timing] = {}
    owner: dict[str, Worker] = {}
    for worker in workers:
        for lane, timing in _ready(worker, started + READY * seconds).items():
            name = f"{worker.name}:{lane}"
            timings[name] = timing
            if timing.failed is None:
                owner[name] = worker
    for _ in range(rounds):
        for lane, worker in list(owner.items()):
            try:
                worker.ask(lane.removeprefix(f"{worker.name}:"))
                answer = worker.answer(started + seconds)
            except (ConnectionError, BrokenPipeError) as error:
                answer = {"failed": str(error)}
            if answer is not None and "seconds" in answer:
                timings[lane].seconds.append(answer["seconds"])
                continue
            del owner[lane]
            if answer is not None:
                timings[lane] = timings[lane]._replace(failed=answer["failed"])
            elif not timings[lane].seconds:  # else the time is over, and the rounds so far count
                timings[lane] = timings[lane]._replace(failed="its round did not end in time")
    return timings


def _ready(worker: Worker, deadline: float) -> dict[str, Timing]:
    """What a process says of its lanes while it builds them. One that is not done in time is ended."""
    found: dict[str, Timing] = {}
    why = None
    while len(found) < len(worker.lanes) and why is None:
        try:
            answer = worker.answer(deadline)
        except ConnectionError as error:
            why = str(error)
            continue
        if answer is None:
            why = f"{worker.lanes[len(found)]} was not ready in time"
            continue
        facts = {key: value for key, value in answer.items() if key not in ("lane", "failed")}
        found[answer["lane"]] = Timing([], facts, answer.get("failed"))
    if why is None:
        return found
    worker.close()
    failures = {lane: timing.failed or why for lane, timing in found.items()}
    return {lane: Timing([], {}, failures.get(lane, why)) for lane in worker.lanes}
