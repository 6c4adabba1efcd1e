"""Text of files and models for a terminal: what would move its cursor, colour it or turn its lines is spelled out."""

import sys

LONGEST = 4000
"""Characters of a message; a value from a file can have millions."""

_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
"""C0 (which begins escape sequences with ESC), DEL and C1 (which has them in one character)."""
_TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that turn the direction of writing: a name may read as another (https://trojansource.codes)."""
_BREAKS = {0x2028, 0x2029}
_SPELLED = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS | _TURNS | _BREAKS}
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS | _TURNS | _BREAKS if code >= 0x7F}


def printable(text: str) -> str:
    """The text with control characters spelled out as Python spells them; line feeds and tabs stay."""
    return text.translate(_SPELLED)


def printable_json(text: str) -> str:
    """The same JSON, with escapes for what `printable` spells out: Python's writer leaves DEL and what is above."""
    return text.translate(_ESCAPED)


def for_stdout(text: str) -> str:
    """The text as it is where a file or a pipe gets stdout, and `printable` where a terminal does."""
    return printable(text) if sys.stdout is not None and sys.stdout.isatty() else text


def one_line(text: str) -> str:
    """A message on one line, `printable`, its middle left out where it is longer than LONGEST."""
    line = printable(" ".join(text.split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST - 500]} [... {len(line) - LONGEST:,} characters left out ...] {line[-500:]}"
