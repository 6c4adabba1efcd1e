"""How processes find one another: all there, one missing, one twice, and who else may be at the port."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import socket
import time

import pytest
from process_group import free_address

from jaxlm.errors import UserError
from jaxlm.sharding.meeting import Line, Member, meet

VERSIONS = {"jaxlm": "1", "jax": "2"}


def member(i, processes, **changes):
    return dataclasses.replace(Member(i, processes, f"node{i}", 100 + i, VERSIONS), **changes)


def met(*members, address=None, seconds=2.0):
    """What `meet` gives to each member, all at once: the others' names, or the refusal."""
    address = address or free_address()

    def one(me):
        time.sleep(0.1 * me.process_id)
        try:
            there, lines = meet(address, me, seconds)
        except UserError as error:
            return str(error)
        for line in lines.values():
            line.close()
        return [str(other) for other in there]

    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members))


def test_all_learn_who_the_others_are():
    names = [f"process {i} of 3 (node{i}, pid {100 + i})" for i in range(3)]
    assert met(*(member(i, 3) for i in range(3))) == [names] * 3
    assert met(member(0, 1)) == [["process 0 of 1 (node0, pid 100)"]]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([member(0, 4), member(1, 4)], r"processes 2, 3 of 4 did not come to 127.0.0.1:\d+ within 1 s: start all"),
        (
            [member(0, 3), member(1, 3), member(1, 3, host="node7", pid=7)],
            r"process id 1 was given twice, on node(1|7) \(pid \d+\) and on node(1|7) \(pid \d+\): give each",
        ),
        (
            [member(0, 2), member(1, 3)],
            r"process 0 of 2 \(node0, pid 100\) and process 1 of 3 \(node1, pid 101\) count differently: give both",
        ),
        (
            [member(0, 2), member(1, 2, versions=VERSIONS | {"jax": "3"})],
            r"process 0 of 2 \(node0, pid 100\) has jax 2 and process 1 of 2 \(node1, pid 101\) has 3: install",
        ),
    ],
)
def test_all_are_refused_by_the_same_line(members, words):
    lines = met(*members, seconds=1.0)
    assert len({*lines}) == 1
    assert re.match(words, lines[0])


def test_a_process_that_went_away_is_missing_and_may_come_again():
    address = free_address()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(met, member(0, 3), address=address, seconds=5.0)
        gone = connected(address)
        gone.sendall(json.dumps(dataclasses.asdict(member(1, 3, pid=7))).encode() + b"\n")
        gone.close()
        others = met(member(1, 3), member(2, 3), address=address)
        assert others == 2 * first.result()
        assert others[0][1] == "process 1 of 3 (node1, pid 101)"


def connected(address):
    """A connection to an address, once somebody listens there."""
    host, port = address.split(":")
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            time.sleep(0.02)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b'{"process_id": 1}\n', b"[1]\n", b""])
def test_a_stranger_disturbs_nobody(words):
    address = free_address()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(met, member(0, 2), address=address, seconds=5.0)
        with connected(address) as stranger:
            stranger.sendall(words)
            if not words:
                stranger.close()
            assert len(met(member(1, 2), address=address)[0]) == len(first.result()[0]) == 2


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (line,) = met(member(0, 2), address=f"node0:{port}")
    assert line.startswith(f"process 0 cannot listen at node0:{port} (Address already in use): another program")
    assert f"port {port} of this host" in line


def test_a_coordinator_that_cannot_be_reached_is_named():
    address = free_address()
    (line,) = met(member(1, 2), address=address, seconds=0.3)
    assert line.startswith(f"process 1 of 2 (node1, pid 101): process 0 cannot be reached at {address} within 0 s (")
    assert "(Connection refused): start it at about the same time" in line
    (line,) = met(member(1, 2), address="no-such-host.invalid:7000", seconds=0.3)
    assert "cannot be reached at no-such-host.invalid:7000" in line


def test_a_coordinator_that_says_nothing_is_named(monkeypatch):
    monkeypatch.setattr("jaxlm.sharding.meeting.VERDICT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        (line,) = met(member(1, 2), address=f"127.0.0.1:{server.getsockname()[1]}", seconds=0.2)
    assert "(no answer)" in line


def test_a_coordinator_that_says_something_else_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(met, member(1, 2), address=f"127.0.0.1:{server.getsockname()[1]}", seconds=0.1)
        server.settimeout(0.5)
        while not first.done():
            with contextlib.suppress(TimeoutError), server.accept()[0] as connection:
                connection.sendall(b"\x00\x00HTTP/2\n")
                connection.recv(1000)
        (line,) = first.result()
    assert "(what listens there is not a process 0 that waits: another program, or a training under way)" in line


def test_a_line_ends_when_the_other_end_does():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = Line(socket.create_connection(server.getsockname()))
        theirs = Line(server.accept()[0])
    ours.send({"a": 1})
    assert theirs.receive(1.0) == {"a": 1}
    assert ours.is_open()
    with pytest.raises(TimeoutError):
        theirs.receive(0.01)
    theirs.close()
    assert not ours.is_open()
    assert list(ours.messages()) == []
    ours.send({"a": 1})  # nobody hears it
    ours.close()
