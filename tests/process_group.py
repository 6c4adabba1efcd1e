"""Several processes of a test on loopback: each runs `process_child.py`, or `jaxlm train`."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from checking import PROGRAMS

CHILD = Path(__file__).parent / "process_child.py"


class Ended(NamedTuple):
    """How a process has ended."""

    code: int
    out: list[str]
    err: list[str]
    pid: int


def free_address() -> str:
    """HOST:PORT on loopback, where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def launch(what: str, *arguments: object, count: int = 2, patience: float = 60, devices: int = 1) -> list:
    """Starts `count` processes that meet and then do what `what` says in `process_child.py`."""
    address = free_address()
    return [
        _started([CHILD, address, str(count), str(i), str(patience), what, *arguments], devices, PYTHONWARNINGS="error")
        for i in range(count)
    ]


def train(*options: object, count: int = 1, devices: int = 1, x64: bool = False, own=None) -> list[subprocess.Popen]:
    """Starts `jaxlm train OPTIONS` in `count` processes of so many virtual devices each.

    Args:
      own: options of single processes, by id.
    """
    address, children = free_address(), []
    for i in range(count):
        place = ("--mesh.coordinator", address, "--mesh.processes", count, "--mesh.process-id", i)
        command = ["-m", "jaxlm", "train", *options, *(place if count > 1 else ()), *(own or {}).get(i, ())]
        children.append(_started(command, devices, JAX_ENABLE_X64=str(int(x64))))
    return children


def _started(arguments: list, devices: int, **variables: str) -> subprocess.Popen:
    environment = os.environ | {
        "TF_CPP_MIN_LOG_LEVEL": "4",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": PROGRAMS,
        **variables,
    }
    command = [sys.executable, "-u", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(child: subprocess.Popen, seconds: float = 120) -> Ended:
    """Waits for the end of a process; what Gloo's threads say on stdout, into one another's lines, is left out."""
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    lines = [line for line in out.splitlines() if line and "[Gloo]" not in line and "peer ranks" not in line]
    return Ended(child.returncode, lines, err.splitlines(), child.pid)
