"""What the commands print: tables by rich and JSON on stdout, lines about the work on stderr."""

import sys
from typing import Any, NoReturn

from jaxlm import strict_json
from jaxlm.terminal import printable, printable_json


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that are not finite are null."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a StringIO has none, and stdout may be closed
    print(printable_json(strict_json.dumps(value, ensure_ascii=encoding.lower() != "utf-8")))


def say(text: str) -> None:
    """A line on stderr; control characters, as the names of folders may have, are spelled out."""
    print(printable(text), file=sys.stderr, flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; what looks like rich's markup or moves the cursor is text."""
    import rich.console  # only what prints a table waits for the import
    import rich.table
    import rich.text

    class Console(rich.console.Console):
        def on_broken_pipe(self) -> NoReturn:
            raise  # rich would end the program with exit code 1

    table = rich.table.Table(*(rich.table.Column(name, overflow="fold") for name in columns), title=printable(title))
    for row in rows:
        table.add_row(*(rich.text.Text(printable(cell)) for cell in row))
    Console().print(table)
