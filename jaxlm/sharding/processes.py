"""Training by several processes: how they start, agree, and end together.

JAX's own runtime connects them (`jax.distributed`) and moves all data between them
(`jax.experimental.multihost_utils`). Where one process trains alone, every function here returns at once.
"""

import atexit
import contextlib
import ctypes
import importlib.metadata
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.config import MeshConfig
from jaxlm.errors import CheckError, UserError
from jaxlm.sharding.meeting import Member, Watch, meet

PATIENCE = 45.0
"""Seconds that processes wait for one another when they start."""

HEARTBEAT = 30
"""Seconds after which JAX takes a process for dead that is connected but silent, stopped for example."""

LEAVE = 300.0
"""Seconds that a process which is done waits for the others to be done."""

_watch: Watch | None = None
"""JAX's runtime is one for the whole process, and so is this; None = this process trains alone."""


class Place(NamedTuple):
    """Where a process stands among the others."""

    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    process_id: int
    local_devices: Sequence[int] | None = None
    """Devices of this host that are this process's, as a cluster may say; None = all."""


def start(cfg: MeshConfig, patience: float = PATIENCE) -> None:
    """Meets the other processes and connects JAX to them; nothing without a coordinator, or the second time.

    Must come before anything is computed. From then on this process ends when another one dies or fails, with one line
    on stderr that names it.

    Args:
      patience: seconds to wait for the others.

    Raises:
      UserError: in all processes that came, with the same line, if one is missing, is there twice, or has other
        versions; in this one, if process 0 cannot be reached, its port is taken, or no cluster is found.
    """
    global _watch
    if cfg.coordinator is None or _watch is not None:
        return
    place = _detected(patience) if cfg.coordinator == "auto" else _given(cfg)
    versions = {name: importlib.metadata.version(name) for name in ("jaxlm", "jax", "jaxlib")}
    me = Member(place.process_id, place.processes, socket.gethostname(), os.getpid(), versions)
    watch = Watch(me, *meet(place.coordinator, me, patience))
    _end_in_one_line(watch)
    try:
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process_id,
            place.local_devices,
            initialization_timeout=int(patience),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        watch.fail(f"JAX cannot connect {me} at {place.coordinator}: {error}", 2)
    _watch = watch
    atexit.register(_leave, watch)  # runs before JAX's own


def _given(cfg: MeshConfig) -> Place:
    return Place(str(cfg.coordinator), int(cfg.processes or 1), int(cfg.process_id or 0))


def _detected(patience: float) -> Place:
    """What the cluster's environment says, as JAX reads it.

    Raises:
      UserError: no cluster is found, or it does not say enough.
    """
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize has no public way to ask before it connects

    try:
        # address, processes, process id, local devices, method: what is not given is detected
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(patience))
    except Exception as error:  # whatever a cluster's own library raises
        raise UserError(
            f"mesh.coordinator = auto: the cluster does not say where this process stands ({error}); give HOST:PORT, "
            "--mesh.processes and --mesh.process-id"
        ) from None
    address, number, process_id, devices = found
    if address is None or number is None or process_id is None:
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        known = ", ".join(kind.name or kind.__name__ for kind in kinds)
        raise UserError(
            f"mesh.coordinator = auto: this process is in no cluster that JAX knows ({known}); give HOST:PORT of "
            "process 0, --mesh.processes and --mesh.process-id"
        )
    return Place(address, number, process_id, devices)


def _end_in_one_line(watch: Watch) -> None:
    """Turns the SIGABRT by which JAX's runtime ends a process into one line.

    It raises the signal in a thread of its own, the moment that process 0 is gone or after a silence of HEARTBEAT. A
    handler of Python's would run in the main thread, too late; this one runs where the signal is raised.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(signum: int) -> None:
        time.sleep(2)  # the watch knows more
        watch.end(
            f"{watch.me}: JAX's runtime has ended this process, most likely because another one no longer answers; "
            f"TF_CPP_MIN_LOG_LEVEL=0 shows why: {watch.advice()}",
            1,
        )

    _keep_for_ever(handler)  # C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


@contextlib.contextmanager
def joined(cfg: MeshConfig, patience: float = PATIENCE) -> Iterator[None]:
    """Starts as `start` does. With others, an error in the block ends this process at once, and all others with it.

    Each prints one line and exits with the code of the command: 2 after a UserError, 130 after an interrupt, else 1. In
    the others the line names this process. An error of JAX itself may only follow from another process's end, so that
    one gets a moment to be known first. Alone, this raises what the block raises.

    Raises:
      UserError: as `start`.
    """
    start(cfg, patience)
    if _watch is None or _watch.guarded:  # the outermost block ends the process, when what lies within is tidied up
        yield
        return
    _watch.guarded = True
    try:
        yield
    except BaseException as error:
        _end_all(_watch, error)
    finally:
        _watch.guarded = False


def _end_all(watch: Watch, error: BaseException) -> NoReturn:
    if isinstance(error, UserError | CheckError):
        watch.fail(str(error), 2 if isinstance(error, UserError) else 1)
    if isinstance(error, KeyboardInterrupt):
        watch.fail("interrupted", 130)
    time.sleep(5)
    traceback.print_exception(error)
    watch.fail(f"{type(error).__name__} {error}", 1)


def _leave(watch: Watch) -> None:
    """At the end of the interpreter: waits for the others if all went well. JAX's own shutdown would abort if not."""
    if hasattr(sys, "last_value"):  # an error has been printed
        watch.fail(f"{type(sys.last_value).__name__} {sys.last_value}", 1)
    if not watch.leave(LEAVE):
        watch.fail(f"{LEAVE:.0f} s after its end other processes go on", 1)


def _keep_for_ever(thing: object) -> None:
    """Lets nothing destroy an object, not even the end of the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def count() -> int:
    """How many processes train together."""
    return 1 if _watch is None else _watch.me.processes


def first() -> bool:
    """Whether this is process 0, which alone writes files and shows progress."""
    return _watch is None or _watch.me.process_id == 0


def advise(advice: Callable[[], str]) -> None:
    """Sets what the line about a process that died says at its end, called when it has died."""
    if _watch is not None:
        _watch.advice = advice


def wait(name: str) -> None:
    """Returns when all processes have come to the call of this name."""
    if _watch is not None:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """In process 0 the block runs first, in the others when it is done there: what it leaves on disk, they find."""
    if not first():
        wait(name)
    yield
    if first():
        wait(name)


def agree(*values: int) -> np.ndarray:
    """What each process gave, int32 [processes, values]: the same array in all processes.

    All must call it in the same order with the same number of values, each within int32.
    """
    row = np.array(values, np.int32)
    return row[None] if _watch is None else multihost_utils.process_allgather(row)


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses values that differ between processes, in all of them.

    Args:
      values: JSON types by name; in nested dicts a name is that of the fields, with dots.

    Raises:
      UserError: names the field, both values and both processes; the same line in all processes.
    """
    if _watch is None:
        return
    theirs = _gather_json(_flat(values))
    for member, other in zip(_watch.members, theirs, strict=True):
        for name in theirs[0] | other:
            a, b = theirs[0].get(name), other.get(name)
            if a != b:
                raise UserError(
                    f"{name} is {a!r} in {_watch.members[0]} and {b!r} in {member}: start all with the same"
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _gather_json(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ids."""
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(agree(content.size).max())
    rows = multihost_utils.process_allgather(np.pad(content, (0, longest - content.size)))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]
