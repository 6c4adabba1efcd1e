"""How processes find one another before JAX connects them, and how they notice that one of them is gone.

JAX's runtime ends a process by SIGABRT and a stack trace if another one does not come, comes twice or dies, and names
none (tried with jax 0.10.1 and 0.12.0.1). So process 0 first listens at the coordinator's address itself. The others
say who they are, and all learn whether everybody is there. Then JAX's coordinator takes over the port, and these
connections stay open: the kernel closes those of a process that dies, and finds a host that no longer answers.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from jaxlm.data.reading import parse_json
from jaxlm.errors import UserError

MAX_MESSAGE = 2**16
"""Bytes of the longest message; whoever sends more is no process of a training."""

VERDICT = 5.0
"""Seconds that the others wait longer than process 0, which says at the end of its own who is missing."""

KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 9000}
"""The kernel takes a host for gone that has not answered for about 9 seconds."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A process that takes part in a training."""

    process_id: int
    processes: int
    host: str
    pid: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"process {self.process_id} of {self.processes} ({self.host}, pid {self.pid})"


class Line:
    """A connection to another process, on which both send JSON objects, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux; other systems find a lost host later, by their own defaults
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._file = connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; nothing if the other process is gone, which `messages` notices."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """The next message; None if the other process is gone, or sends something else.

        Raises:
          TimeoutError: it did not come in time.
        """
        self._socket.settimeout(seconds)
        try:
            message = parse_json(self._file.readline(MAX_MESSAGE).decode())
        except TimeoutError:
            if seconds is None:  # the kernel's keep-alive has given the host up
                return None
            raise
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages, until the other process is gone."""
        while (message := self.receive(None)) is not None:
            yield message

    def is_open(self) -> bool:
        """Whether the other process is still there."""
        self._socket.settimeout(0)
        try:
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Closes the connection."""
        self._file.close()
        self._socket.close()


def meet(address: str, me: Member, seconds: float) -> tuple[list[Member], dict[int, Line]]:
    """Waits until all processes are there.

    Returns:
      All members in the order of their ids, and this process's lines: in process 0 one to each other process, in the
      others one to process 0.

    Raises:
      UserError: in every process that has come, the same: a process is missing, an id was given twice, or their number
        or versions differ. In one process: process 0 cannot be reached, or its port is taken.
    """
    host, _, port = address.rpartition(":")
    if me.process_id == 0:
        return _gather(address, int(port), me, seconds)
    return _join(address, (host.strip("[]"), int(port)), me, seconds)


def _gather(address: str, port: int, me: Member, seconds: float) -> tuple[list[Member], dict[int, Line]]:
    came: dict[int, tuple[Member, Line]] = {}
    deadline = time.monotonic() + seconds
    with _listen(address, port) as server:
        problem = None
        while problem is None and len(came := _still_there(came)) < me.processes - 1:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                connection, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, me.processes) if i not in came]
                problem = (
                    f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {me.processes} did not come to "
                    f"{address} within {seconds:.0f} s: start all of them at about the same time, each with its own "
                    "--mesh.process-id"
                )
                break
            line = Line(connection)
            other = _introduced(line)
            if other is None:
                line.close()
                continue
            came = _still_there(came)
            problem = _misfit({0: me} | {i: member for i, (member, _) in came.items()}, other)
            came[other.process_id if problem is None else -1] = other, line
    if problem is not None:
        for _, line in came.values():
            line.send({"refused": problem})
            line.close()
        raise UserError(problem)
    members = [me, *(came[i][0] for i in range(1, me.processes))]
    lines = {i: line for i, (_, line) in came.items()}
    for line in lines.values():
        line.send({"met": [dataclasses.asdict(member) for member in members]})
    return members, lines


def _listen(address: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address} ({os.strerror(error.errno or 0)}): another program, or another "
            f"process 0, uses port {port} of this host; end it, or choose another port by --mesh.coordinator"
        ) from None


def _still_there(came: dict[int, tuple[Member, Line]]) -> dict[int, tuple[Member, Line]]:
    """Those of the processes that have come that have not gone away again."""
    gone = [i for i, (_, line) in came.items() if not line.is_open()]
    for i in gone:
        came[i][1].close()
    return {i: other for i, other in came.items() if i not in gone}


def _introduced(line: Line) -> Member | None:
    """Who is at the other end; None if it is not a process of jaxlm."""
    try:
        return Member(**(line.receive(5.0) or {}))
    except (TimeoutError, TypeError):
        return None


def _misfit(there: dict[int, Member], other: Member) -> str | None:
    """Why a process that has come does not belong to those that are there."""
    me = there[0]
    if other.processes != me.processes:
        return f"{me} and {other} count differently: give both the same --mesh.processes"
    if other.process_id in there:
        twin = there[other.process_id]
        return (
            f"process id {other.process_id} was given twice, on {twin.host} (pid {twin.pid}) and on {other.host} "
            f"(pid {other.pid}): give each process its own --mesh.process-id"
        )
    for name, version in me.versions.items():
        if other.versions.get(name) != version:
            return (
                f"{me} has {name} {version} and {other} has {other.versions.get(name)}: install the same version on all"
            )
    return None


def _join(address: str, place: tuple[str, int], me: Member, seconds: float) -> tuple[list[Member], dict[int, Line]]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            line = Line(socket.create_connection(place, timeout=min(seconds, 5.0)))
            answer = _answer(line, me, seconds)
            if "met" in answer:
                return [Member(**member) for member in answer["met"]], {0: line}
            line.close()
            if "refused" in answer:
                raise UserError(answer["refused"])
            why = "what listens there is not a process 0 that waits: another program, or a training under way"
        except TimeoutError:
            why = "no answer"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"{me}: process 0 cannot be reached at {address} within {seconds:.0f} s ({why}): start it at about the "
                "same time as the others, or correct --mesh.coordinator"
            )
        time.sleep(0.2)


def _answer(line: Line, me: Member, seconds: float) -> dict[str, Any]:
    """What process 0 answers to a process that introduces itself; {} if it is no process 0 that waits.

    Raises:
      TimeoutError: nothing came.
    """
    line.send(dataclasses.asdict(me))
    try:
        return line.receive(seconds + VERDICT) or {}  # process 0 may have come later than this one, and waits as long
    except TimeoutError:
        line.close()
        raise


class Watch:
    """Ends this process when another one has died, or has ended with an error.

    Process 0 hears it from the kernel or from the process itself and tells the others. Of process 0 they hear alike.
    """

    def __init__(self, me: Member, members: list[Member], lines: dict[int, Line]) -> None:
        """Starts a thread for each line, which lives as long as the process."""
        self.me, self.members = me, members
        self.advice: Callable[[], str] = lambda: "start all again"
        """What to do when a process has died."""
        self.guarded = False
        """Whether an error is being waited for already; `processes.joined` sets it."""
        self._lines = lines
        self._ending = threading.Lock()  # taken by whoever ends this process, and never given back
        self._left: set[int] = set()
        self._all_left = threading.Event()
        for process_id, line in lines.items():
            threading.Thread(target=self._listen, args=(members[process_id], line), daemon=True).start()

    def _listen(self, other: Member, line: Line) -> None:
        for message in line.messages():
            if "left" in message:
                self._left.add(other.process_id)
                if len(self._left) == len(self._lines):
                    self._all_left.set()
            elif "died" in message:
                self._died(message["died"])
            else:
                self._failed(message["failed"], message["code"])
        if other.process_id not in self._left:
            self._died(str(other))

    def _died(self, who: str) -> None:
        self._send({"died": who})
        self.end(f"{who} died: {self.advice()}", 1)

    def _failed(self, why: str, code: int) -> None:
        self._send({"failed": why, "code": code})
        time.sleep(1)  # this process may be about to fail by the same error, and then says so itself
        self.end(why, code)

    def _send(self, message: dict[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)

    def fail(self, why: str, code: int) -> NoReturn:
        """Ends this process by an error of its own, and the others with it."""
        self._ending.acquire()
        self._send({"failed": f"{self.me} ended: {why}", "code": code})
        self._exit(why, code)

    def end(self, why: str, code: int) -> None:
        """Ends this process for a reason that the others learn for themselves, unless it is ending already."""
        self._ending.acquire()
        self._exit(why, code)

    def _exit(self, why: str, code: int) -> NoReturn:
        """Ends this process at once, with one line on stderr: threads may wait for others for ever."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        shows_cursor = "\n\x1b[?25h" if os.isatty(2) else ""  # where a progress bar may be
        os.write(2, f"{shows_cursor}jaxlm: error: {' '.join(why.split())}\n".encode())
        os._exit(code)

    def leave(self, seconds: float) -> bool:
        """Says that this process is done, and waits until all are; returns whether they are."""
        self._send({"left": True})
        return not self._lines or self._all_left.wait(seconds)
