"""Plants the bugs, one after another, and prints what caught each: `python parity_tests/planted --help`."""

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # python parity_tests/planted
    sys.path[0] = str(Path(__file__).parent.parent)

from jaxlm.compilation_cache import kept_programs
from planted.runner import Answer, ask, tool_of
from planted.tables import KINDS

HEADER = "| kind | bug | caught by | layer | cause named |\n|---|---|---|---|---|"


def main() -> int:
    """Prints a Markdown table, or JSON lines; returns 1 if a bug was missed."""
    parser = argparse.ArgumentParser(
        prog="python parity_tests/planted", description="Plant each bug in jaxlm's source, ask its check, and print "
        "what caught it, where it is and which cause was named."
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the bugs whose names contain one of these")
    parser.add_argument("--kind", choices=[*KINDS], action="append", help="only the bugs of a kind; may be repeated")
    parser.add_argument("--list", action="store_true", help="describe the bugs, plant none")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--tool", action="append", default=[], metavar="[CHECK=]MODULE:FUNCTION",
        help="ask another tool's function in place of the check of this name (none = model), about its bugs only"
    )  # fmt: skip
    options = parser.parse_args()
    pairs = [tool.rpartition("=")[::2] for tool in options.tool]
    try:
        tools = {check or "model": tool_of(name) for check, name in pairs}
    except ValueError as error:
        parser.error(str(error))
    chosen = [
        (kind, bug)
        for kind, bugs in KINDS.items()
        for bug in bugs
        if kind in (options.kind or KINDS)
        and (not options.words or any(word in bug.name for word in options.words))
        and (not tools or bug.check in tools)
    ]
    if not chosen:
        parser.error("no bug is chosen: `--list` names them all")
    if options.list:
        for kind, bug in chosen:
            print(json.dumps({"kind": kind, **bug.to_dict()}) if options.json else f"{kind}: {bug.name}. {bug.what}")
        return 0
    if not options.json:
        print(HEADER)
    answers: list[Answer] = []
    for kind, bug in chosen:
        begin = time.monotonic()
        answers.append(answer := ask(bug, tools))
        if options.json:
            seconds = round(time.monotonic() - begin, 1)
            print(json.dumps({"kind": kind, "name": bug.name, **answer._asdict(), "seconds": seconds}), flush=True)
        else:
            cause = f"WRONG: {'; '.join(answer.wrong)}" if answer.wrong else answer.cause
            print(f"| {kind} | {bug.name} | {bug.quantity} | {answer.layer or 'none'} | {cause} |", flush=True)
    right = sum(not answer.wrong for answer in answers)
    if not options.json:
        caught, located, tried = (sum(getattr(a, name) for a in answers) for name in ("caught", "located", "tried"))
        print(
            f"\n{len(answers)} bugs: {caught} caught, {located} located, {tried} with the cause tried out; "
            f"{right} as expected"
        )
    return int(right < len(answers))


if __name__ == "__main__":
    with kept_programs():  # most of the time goes into compiling
        sys.exit(main())
