"""Several processes of a test on loopback, each of which runs `process_child.py`."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


def launch(what: str, count: int = 2, patience: float = 60) -> list[subprocess.Popen]:
    """Starts `count` processes that meet and then do what `what` says in `process_child.py`."""
    address = free_address()
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "4", "PYTHONWARNINGS": "error", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-u", CHILD, address, str(count), str(i), str(patience), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]


def ended(child: subprocess.Popen, seconds: float = 120) -> Ended:
    """Waits for the end of a process; what Gloo says on stdout is left out."""
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    return Ended(child.returncode, lines, err.splitlines(), child.pid)
