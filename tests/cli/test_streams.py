"""Commands whose stdin, stdout or stderr is closed or full."""

import json
import os
import subprocess
import sys

import pytest
from checking import PROGRAMS
from support import command

from jaxlm.cli.main import main


def shell(redirections, *arguments, **environment):
    """(exit code, stdout, stderr) of `jaxlm ARGUMENTS REDIRECTIONS`."""
    python = ["sh", "-c", f'exec "$0" -m jaxlm "$@" {redirections}', sys.executable, *map(str, arguments)]
    known = {"JAX_COMPILATION_CACHE_DIR": PROGRAMS, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(python, capture_output=True, env={**os.environ, **known, **environment}, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    ("redirections", "why"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
def test_a_stdout_that_cannot_be_written_is_one_line(redirections, why):
    for arguments in (["presets"], ["presets", "--json"], ["sample", "--help"], ["--help"]):
        assert shell(redirections, *arguments) == (1, b"", f"jaxlm: error: stdout cannot be written ({why})\n")


def test_without_stderr_nothing_of_it_goes_to_stdout():
    assert shell("2>&-", "trane") == (2, b"", "")
    assert shell("<&- >&- 2>&-", "presets") == (1, b"", "")
    assert shell("2>/dev/full", "trane") == (2, b"", "")
    assert shell("2</dev/null", "trane") == (2, b"", "")


def test_no_file_gets_the_number_of_a_closed_stream():
    """What libraries print to it would be written into that file."""
    program = (
        "import os, sys; from jaxlm.cli.main import COMMANDS, main\n"
        "file = lambda arguments: print(open(os.devnull).fileno(), file=answers) or 0\n"
        "answers = os.fdopen(7, 'w'); COMMANDS['runs'] = (file, '', ''); sys.exit(main(['runs']))"
    )
    python = ["sh", "-c", 'exec "$0" -c "$1" 7>&1 <&- >&- 2>&-', sys.executable, program]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(python, capture_output=True, text=True, env={**os.environ, **path}, check=False)
    assert done.returncode == 0
    assert int(done.stdout) > 2


def test_a_sample_is_kept_before_it_is_shown(folder, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", PROGRAMS)
    arguments = ["sample", "runs/tiny-1", "--max-new-tokens", "20", "--seed", "77"]
    kept = folder / "runs/tiny-1/samples"
    lines = "kept: runs/tiny-1/samples/step-30-seed-77{}.json\njaxlm: error: stdout cannot be written (No space left{}"
    for suffix, more in (("", []), ("-2", ["--json"])):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main([*arguments, *more]) == 1
        assert capsys.readouterr().err == lines.format(suffix, " on device)\n")
    whole = json.loads(command(*arguments, "--json")[1])
    assert json.loads((kept / "step-30-seed-77.json").read_text()) == whole
    for number in kept.glob("step-30-seed-77*"):
        number.unlink()


def test_a_closed_stdin_has_no_prompt(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["sample", "runs/tiny-1", "--prompt-file", "-"]) == 2
    assert capsys.readouterr().err == (
        "jaxlm: error: stdin cannot be read (Bad file descriptor): give an existing UTF-8 text, or - for stdin\n"
    )


def test_a_locale_of_one_byte_a_character_shows_what_it_can(folder, monkeypatch, tmp_path):
    """As a console of Windows with code page 1252."""
    for encoding, shown in (("cp1252", b"caf\xe9 ?"), ("ascii", b"caf? ?")):
        with (tmp_path / encoding).open("w", encoding=encoding) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr("jaxlm.cli.main._usage", lambda: "café 漢")
            assert main(["--help"]) == 0
        assert (tmp_path / encoding).read_bytes() == shown + b"\n"
