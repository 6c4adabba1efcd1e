"""Gives the commands bad input of every kind, as one would type it, and writes what they answer as a table.

python scripts/bad_inputs.py [--write docs/results/bad-inputs.md] [--only WORD]

Each must end with exit code 1 or 2 and one line on stderr, quickly, and write nothing; `jaxlm` alone prints how it is
used. The exit code is 1 if one does not. All run in one process. Those that need torch are left out where that is
missing.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

SECONDS = 30.0
NEED_TORCH = "hf-code", "hf-bomb", "nanogpt ckpt", "torchref torchref", "meta meta-"


class Answer(NamedTuple):
    """What a command did."""

    command: str
    code: int | str
    """The exit code, or the exception that escaped."""
    message: str
    problem: str
    """What is wrong with the answer; empty if nothing is."""


def commands(only: str = "") -> list[str]:
    """The commands that can be tried here."""
    from bad_files import COMMANDS

    has_torch = importlib.util.find_spec("torch") is not None
    return [c for c in COMMANDS if only in c and (has_torch or not any(word in c for word in NEED_TORCH))]


def answers(wanted: list[str], folder: Path) -> list[Answer]:
    """Makes the bad files in an empty folder and tries the commands there."""
    from bad_files import make_all

    make_all(folder)
    with contextlib.chdir(folder):
        before = _names(folder)
        found = [_answer(command) for command in wanted]
        if new := sorted(_names(folder) - before - {"runs"}):
            found.append(Answer("all of them", 0, "", f"left {', '.join(new)}"))
    return found


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _answer(command: str) -> Answer:
    from jaxlm.cli.main import main

    out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
    code: int | str
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command.split())
    except BaseException as error:  # a traceback, for who types it
        code = type(error).__name__
        err.write(str(error))
    lines = err.getvalue().splitlines()
    said = [line for line in lines if line.startswith("jaxlm: error: ")]
    problems = {
        "not refused": code not in (1, 2),
        "something on stdout": bool(out.getvalue()) and bool(command),
        "no usage": not out.getvalue() and not command,
        "not one line": len(said) != 1 and bool(command),
        "control characters": re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", err.getvalue()) is not None,
        "too long": any(len(line) > 5000 for line in lines),
        "too slow": time.monotonic() - started > SECONDS,
    }
    message = said[0] if said else " ".join(lines) if command else "(the usage)"
    return Answer(command, code, message, ", ".join(name for name, there in problems.items() if there))


def table(found: list[Answer], folder: Path) -> str:
    """The answers in Markdown."""
    rows = ["| `jaxlm` ... | exit code | answer |", "| --- | --- | --- |"]
    for one in found:
        message = one.message.removeprefix("jaxlm: error: ").replace(str(folder.resolve()), "...").replace("|", "\\|")
        shown = message if len(message) <= 300 else f"{message[:200]} ... {message[-80:]}"
        rows.append(f"| `{one.command}` | {one.code} | {shown.replace('<', '&lt;')} |")
    return "\n".join(rows) + "\n"


def summary_of(found: list[Answer]) -> str:
    """How many are answered as they must be."""
    by_line = sum(bool(one.command) and not one.problem for one in found)
    usage = any(not one.command and not one.problem for one in found)
    also = "; the empty command prints how it is used, with exit code 2" if usage else ""
    return f"{len(found)} bad inputs, {by_line} answered by one line and exit code 1 or 2{also}."


def main() -> int:
    """Tries all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    wanted = commands(options.only)
    with tempfile.TemporaryDirectory() as name:
        found = answers(wanted, Path(name))
        text = table(found, Path(name))
    wrong = [one for one in found if one.problem]
    summary = summary_of(found)
    if options.write is not None:
        intro = "Written by `python scripts/bad_inputs.py --write docs/results/bad-inputs.md`."
        options.write.write_text(f"# Bad inputs, and what the commands answer\n\n{intro}\n{summary}\n\n{text}")
    else:
        print(text)
    print(summary, file=sys.stderr)
    for one in wrong:
        print(f"{one.problem}: jaxlm {one.command}: {one.code} {one.message[:300]}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
