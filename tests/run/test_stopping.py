"""Signals, in this process."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxlm.run.stopping import SIGNALS, collected


def send(signum):
    os.kill(os.getpid(), signum)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_collected_and_the_second_meets_the_old_handlers(signum):
    said, late = [], []
    for each in SIGNALS:
        signal.signal(each, lambda number, frame: late.append(number))
    with collected(said.append) as received:
        send(signum)
        wait_for(lambda: said)
        assert received == [signum]
        assert late == []
        send(signal.SIGINT)  # another one, too, acts at once
        wait_for(lambda: late == [signal.SIGINT])
    assert said == [f"{signal.Signals(signum).name}: saving; once more stops at once"]
    assert received == [signum]
    send(signum)
    wait_for(lambda: late == [signal.SIGINT, signum])


def test_the_line_is_said_while_the_main_thread_computes():
    said = []
    with collected(said.append) as received:
        threading.Timer(0.05, send, [signal.SIGTERM]).start()
        seen = []
        watch = threading.Thread(target=lambda: (wait_for(lambda: said), seen.append(list(received))))
        watch.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # one instruction, in which Python runs no handler
        watch.join()
    assert seen == [[]]
    assert received == [signal.SIGTERM]


def test_an_ignored_hangup_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with collected(lambda line: None) as received:
        send(signal.SIGHUP)
        send(signal.SIGTERM)
        wait_for(lambda: received)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_changed():
    before, seen = [signal.getsignal(signum) for signum in SIGNALS], []

    def run():
        with collected(print) as received:
            seen.append((received, [signal.getsignal(signum) for signum in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [([], before)]


PROGRAM = """
import hashlib, sys
from jaxlm.run import stopping
stopping.GRACE = 0.2
with stopping.collected(lambda line: print(line, flush=True)):
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # a minute
"""


def test_a_second_signal_ends_a_process_that_computes():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT: saving; once more stops at once\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    # Where the first came before the computing, Python's own handlers are back already.
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
