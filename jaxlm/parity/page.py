"""The proof as files: report.json, and index.html, which needs nothing from outside."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlm import strict_json
from jaxlm.data.files import staged
from jaxlm.errors import UserError
from jaxlm.parity.measure import Row
from jaxlm.parity.report import COLUMNS, Report, summary

NAMES = ("report.json", "index.html")

SERIES = (
    ("jax_error", "JAX in the compared type", "#0072b2", 4.0),
    ("torch_error", "reference in the compared type", "#e69f00", 2.5),
    ("float64_rel", "both in float64", "#009e73", 3.0),
)
"""What a chart shows: a field of Row, its name, its colour (from Okabe and Ito's palette) and the size of its dots."""

CHARTS = (
    ("activation", "Error of every layer's output, in the order of computation"),
    ("gradient", "Error of the gradient of every parameter"),
)

LOWEST, HIGHEST = -18, 0
"""Decades of a chart. What is zero lies on the lowest line."""

STEP, HEIGHT, LEFT, FOOT = 14, 240, 60, 150
"""Pixels: between two dots, of the chart, and of the space for the names."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: .15rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
.scroll { overflow-x: auto; }
.same { color: #00684d; } .DIFFERS { color: #b00020; font-weight: bold; } .rounding { color: #8a5a00; }
dt { font-weight: bold; float: left; clear: left; width: 12rem; } dd { margin-left: 13rem; overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; }
svg text { font: 10px system-ui, sans-serif; fill: #444; }
"""


def check_new_report(folder: Path) -> None:
    """Refuses a folder in which a report could not be written, before anything is computed.

    Raises:
      UserError: it is a file, or holds a report already.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one for the report")
    there = [name for name in NAMES if (folder / name).exists()]
    if there:
        raise UserError(f"{folder} has {' and '.join(there)} already: choose another folder, or move it away")


def write_report(folder: Path, title: str, facts: dict[str, Any], report: Report) -> None:
    """Writes a report as report.json and index.html.

    Args:
      facts: what was compared, versions and hashes; the numbers of `report` come after them.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): choose another place") from None
    contents = (strict_json.dumps({**facts, **report.to_dict()}, indent=1) + "\n", page(title, facts, report))
    for name, text in zip(NAMES, contents, strict=True):
        with staged(folder / name) as file:
            file.write_text(text, encoding="utf-8")


def page(title: str, facts: dict[str, Any], report: Report) -> str:
    """The report as one HTML document with its style and pictures inside."""
    verdict = "The two are the same up to rounding" if report.passed else "The two differ"
    quantities = dict.fromkeys(row.quantity for row in report.rows)
    worst = _table(COLUMNS, Report(tuple(report.worst(quantity) for quantity in quantities)).table())
    charts = [_chart(words, [row for row in report.rows if row.quantity == kind]) for kind, words in CHARTS]
    parts = [
        f"<h1>{_text(title)}: jaxlm beside {_text(facts.get('reference', 'torch'))}</h1>",
        f'<p class="{"same" if report.passed else "DIFFERS"}"><strong>{verdict}.</strong></p>',
        f"<pre>{_text(chr(10).join(summary(report)))}</pre>",
        f"<h2>What was compared</h2><dl>{''.join(_definition(*fact) for fact in facts.items())}</dl>",
        f"<h2>Worst errors</h2>{worst}",
        "<p>Errors are shares of a tensor's largest value; those of JAX and of torch are root mean squares against "
        "float64. Float64 decides what is a bug.</p>",
        *charts,
        f"<h2>Everything compared</h2>{_table(COLUMNS, report.table())}",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(title)}: parity</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _definition(name: str, value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {item}" for key, item in value.items()) or None
    return f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text('none' if value is None else value)}</dd>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose last column is the verdict."""
    heads = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row[:-1]) + f'<td class="{row[-1]}">{row[-1]}</td></tr>'
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _chart(words: str, rows: list[Row]) -> str:
    """The errors of some rows as dots over their names, on a logarithmic scale; nothing without rows."""
    if not rows:
        return ""
    width = LEFT + STEP * (len(rows) + 1)
    lines = [
        f'<line x1="{LEFT}" x2="{width}" y1="{_y(10.0**decade)}" y2="{_y(10.0**decade)}" stroke="#ddd"/>'
        f'<text x="{LEFT - 6}" y="{_y(10.0**decade) + 3}" text-anchor="end">1e{decade}</text>'
        for decade in range(LOWEST, HIGHEST + 1, 3)
    ]
    dots, names = [], []
    for i, row in enumerate(rows):
        x = LEFT + STEP * (i + 1)
        turned = f'transform="rotate(60 {x} {HEIGHT + 12})"'
        names.append(f'<text x="{x}" y="{HEIGHT + 12}" {turned}>{_text(row.name)}</text>')
        for field, name, colour, size in SERIES:
            error = getattr(row, field)
            if error is not None:
                tip = f"<title>{_text(row.name)}: {_text(name)}, {error:.1e}</title>"
                dots.append(f'<circle cx="{x}" cy="{_y(error)}" r="{size}" fill="{colour}">{tip}</circle>')
    legend = "".join(
        f' <svg width="12" height="10"><circle cx="5" cy="5" r="{size}" fill="{colour}"/></svg> {_text(name)}'
        for _, name, colour, size in SERIES
    )
    extent = f'width="{width + FOOT}" height="{HEIGHT + FOOT}"'
    drawn = f'<svg {extent} role="img" aria-label="{_text(words)}">{"".join(lines + names + dots)}</svg>'
    return f'<h2>{_text(words)}</h2><p>{legend}</p><div class="scroll">{drawn}</div>'


def _y(error: float) -> float:
    """Where an error lies in a chart, in pixels from the top."""
    if not math.isfinite(error):
        error = 10.0**HIGHEST
    decade = min(max(math.log10(error) if error > 0 else LOWEST, LOWEST), HIGHEST)
    return round(10 + (HEIGHT - 20) * (HIGHEST - decade) / (HIGHEST - LOWEST), 1)
