"""Streams that nobody reads, in processes of their own."""

import io
import os
import subprocess
import sys

from jaxlm.run.printing import outlived

PROGRAM = """
import os, sys, warnings
from jaxlm.run.printing import outlived
import rich.console
with outlived(stdout=True):
    os.read(0, 1)  # by now the pipes are closed
    for stream in (sys.stderr, {streams}):
        for _ in range(3):
            print("x" * 9000, file=stream, flush=True)
    warnings.warn("unread")
    rich.console.Console(stderr=True, force_terminal=True).print("unread")
open({done!r}, "w").close()
"""


def outcome(tmp_path, streams, **redirected):
    """The exit code of a program whose readers leave before it prints, and whether it came to its end."""
    done = tmp_path / "done"
    program = PROGRAM.format(streams=streams, done=str(done))
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, **redirected)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.communicate(b"x")
    return process.returncode, done.exists()


def test_a_program_outlives_the_readers_of_its_output(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    assert outcome(tmp_path, "sys.stdout", **pipes) == (0, True)


def test_a_program_outlives_a_full_disk_under_stderr_but_no_result_is_lost_in_silence(tmp_path):
    with open("/dev/full", "wb") as full:
        assert outcome(tmp_path, "", stderr=full, stdout=subprocess.PIPE) == (0, True)
    (tmp_path / "done").unlink()
    with open("/dev/full", "wb") as full:
        assert outcome(tmp_path, "sys.stdout", stdout=full, stderr=subprocess.DEVNULL) == (1, False)


def test_a_program_outlives_a_stderr_that_is_open_for_reading_only(tmp_path):
    with open("/dev/null", "rb") as unwritable:
        assert outcome(tmp_path, "", stderr=unwritable, stdout=subprocess.PIPE) == (0, True)


def test_streams_are_put_back_and_those_of_others_stay(monkeypatch):
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as told, open(writer, "w", encoding="utf-8") as own:
        monkeypatch.setattr(sys, "stderr", own)
        monkeypatch.setattr(sys, "__stderr__", own)
        with outlived():
            assert sys.stderr is not own
            assert sys.stderr.fileno() == writer
            print("é", file=sys.stderr)
            with outlived():
                print("inside", file=sys.stderr)
        assert sys.stderr is own
        assert [told.readline() for _ in range(2)] == ["é\n", "inside\n"]
    for other in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", other)
        with outlived():
            assert sys.stderr is other if other else sys.stderr.name == os.devnull
        assert sys.stderr is other
