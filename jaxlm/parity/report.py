"""What a comparison says: a row for each quantity, and where two implementations first diverge."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxlm.parity.capture import Event
from jaxlm.parity.measure import Row

COLUMNS = ["quantity", "name", "shape", "max abs", "max rel", "ULP", "JAX error", "torch error", "float64", "verdict"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first place, in the order of computation, where the two differ: by a bug, or if by none, by rounding."""

    quantity: str
    layer: str
    """jaxlm's path of the layer, such as block_0/attention; embedding and model name what lies outside all layers."""
    inputs_agree: bool
    """Whether the inputs of that layer are the same in both."""
    where: str
    """The place in words."""
    causes: tuple[str, ...] = ()
    """Likely causes: first those that were tried and explain the difference."""
    verdict: Literal["rounding", "DIFFERS"] = "DIFFERS"
    """rounding: the float64 results agree, so it is not a bug of the formula, but JAX rounds too much."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Every compared quantity, and the first divergence if there is one."""

    rows: tuple[Row, ...]
    first: Divergence | None = None

    @property
    def passed(self) -> bool:
        """Whether the two are the same up to admissible rounding."""
        return self.first is None and all(row.passed for row in self.rows)

    def worst(self, quantity: str) -> Row:
        """The row of a quantity with the largest error: the float64 error where that was computed."""
        rows = [row for row in self.rows if row.quantity == quantity]
        return max(rows, key=lambda row: row.max_rel if row.float64_rel is None else row.float64_rel)

    def table(self) -> list[list[str]]:
        """The rows as texts, under COLUMNS. JAX's, torch's and float64's errors are shares of the largest value."""
        return [
            [
                row.quantity,
                row.name,
                "x".join(map(str, row.shape)),
                *map(_shown, (row.max_abs, row.max_rel, row.ulp, row.jax_error, row.torch_error, row.float64_rel)),
                row.verdict,
            ]
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "passed": self.passed,
            "first_divergence": None if self.first is None else dataclasses.asdict(self.first),
            "rows": [{name: _plain(value) for name, value in dataclasses.asdict(row).items()} for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [COLUMNS, *self.table()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*texts, *summary(self)])


class PartResult(NamedTuple):
    """What the comparison of one part (layers, gradients, updates, decoding) gives."""

    rows: list[Row]
    divergence: Divergence | None


def joined(parts: Sequence[PartResult]) -> Report:
    """The report of several parts, in the order of computation; a bug comes before rounding, wherever that is."""
    divergences = [part.divergence for part in parts if part.divergence is not None]
    bug = next((one for one in divergences if one.verdict == "DIFFERS"), None)
    return Report(tuple(row for part in parts for row in part.rows), bug or next(iter(divergences), None))


def summary(report: Report) -> list[str]:
    """The verdict in words, as lines."""
    if report.first is None:
        failed = [row for row in report.rows if not row.passed]
        return [f"{row.quantity} {row.name}: {row.verdict}" for row in failed] or [
            f"equal up to rounding: {len(report.rows)} quantities"
        ]
    first = report.first
    agree = "its inputs agree" if first.inputs_agree else "its inputs differ already"
    what = "first divergence" if first.verdict == "DIFFERS" else "rounding (float64 agrees), first"
    lines = [f"{what}, {first.quantity}: {first.layer}; {agree}; {first.where}"]
    return lines + [f"  likely cause: {cause}" for cause in first.causes]


def first_divergence(
    quantity: str, events: Sequence[tuple[Event, Row]], verdicts: Sequence[str] = ("DIFFERS", "rounding")
) -> tuple[Event, Row, Divergence] | None:
    """The first event, in the order of computation, that has the first of the verdicts that any event has."""
    for verdict in verdicts:
        for i, (event, row) in enumerate(events):
            if row.verdict == verdict:
                return event, row, _divergence(quantity, event, row, events[:i], {other for other, _ in events})
    return None


def first_failed_row(rows: Sequence[Row]) -> Divergence | None:
    """A divergence that no layer explains: that of the first row that differs, or else rounds too much."""
    failed = sorted((row for row in rows if not row.passed), key=lambda row: row.verdict == "rounding")
    if not failed:
        return None
    row = failed[0]
    return Divergence(
        row.quantity, "model", True, _said(f"{row.quantity} {row.name}".strip(), row), (), divergence_verdict(row)
    )


def _divergence(
    quantity: str, event: Event, row: Row, before: Sequence[tuple[Event, Row]], every: set[Event]
) -> Divergence:
    agreed = [earlier for earlier, _ in before]
    where = f"{_said(str(event), row)}, {f'{agreed[-1]} agrees' if agreed else 'nothing before it was captured'}"
    if event.side == "in":
        # What enters a layer is made by the layer around it, so name that one.
        layer = event.layer.rpartition("/")[0]
        entered = Event(layer, "in", 0)
    else:
        layer, entered = event.layer, event._replace(side="in")
    inputs_agree = entered in agreed or entered not in every
    if not layer:
        layer = "model" if any(earlier.side == "out" for earlier in agreed) else "embedding"
    return Divergence(quantity, layer, inputs_agree, where, (), divergence_verdict(row))


def _said(what: str, row: Row) -> str:
    if row.verdict == "rounding":
        return f"{what} has the rounding error {_shown(row.jax_error)}, torch's has {_shown(row.torch_error)} (RMS)"
    return f"{what} differs"


def divergence_verdict(row: Row) -> Literal["rounding", "DIFFERS"]:
    """The verdict of a row that failed."""
    return "rounding" if row.verdict == "rounding" else "DIFFERS"


def _shown(value: float | None) -> str:
    return (
        "" if value is None else "0" if value == 0 else f"{value:.2g}" if 0.01 <= abs(value) < 1000 else f"{value:.1e}"
    )


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
