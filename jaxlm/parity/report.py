"""What a comparison found, as rows, and where two implementations part first."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jaxlm.parity.capture import Event
from jaxlm.parity.measure import Row

COLUMNS = ["quantity", "name", "shape", "max abs", "max rel", "ULP", "our error", "torch's", "float64", "verdict"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first place, in the order of computation, where the two differ by more than rounding."""

    quantity: str
    layer: str
    """jaxlm's path of the layer, such as block_0/attention; embedding and model name what lies outside of all."""
    inputs_agree: bool
    """Whether what went into that layer is the same in both."""
    where: str
    """In words."""
    causes: tuple[str, ...] = ()
    """Likely causes: first those that were tried out and explain the difference."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Every compared quantity, and the first divergence if there is one."""

    rows: tuple[Row, ...]
    first: Divergence | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing but rounding lies between the two."""
        return self.first is None and all(row.passed for row in self.rows)

    def worst(self, quantity: str) -> Row:
        """The row of a quantity with the largest error: in float64 where that was computed."""
        rows = [row for row in self.rows if row.quantity == quantity]
        return max(rows, key=lambda row: row.max_rel if row.float64_rel is None else row.float64_rel)

    def table(self) -> list[list[str]]:
        """The rows as texts, under COLUMNS; errors are shares of the largest value."""
        return [
            [
                row.quantity,
                row.name,
                "x".join(map(str, row.shape)),
                *map(_shown, (row.max_abs, row.max_rel, row.ulp, row.our_error, row.torch_error, row.float64_rel)),
                row.verdict,
            ]
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
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


def summary(report: Report) -> list[str]:
    """The verdict in words, a line each."""
    if report.first is None:
        failed = [row for row in report.rows if not row.passed]
        return [f"{row.quantity} {row.name}: {row.verdict}" for row in failed] or [
            f"equal up to rounding: {len(report.rows)} quantities"
        ]
    first = report.first
    agree = "its inputs agree" if first.inputs_agree else "its inputs differ already"
    lines = [f"first divergence, {first.quantity}: {first.layer}; {agree}; {first.where}"]
    return lines + [f"  likely cause: {cause}" for cause in first.causes]


def first_divergence(quantity: str, rows: Iterable[tuple[Event, Row]]) -> tuple[Event, Divergence] | None:
    """Where a list of events, in the order of computation, parts first; None if nowhere."""
    agreed: list[Event] = []
    for event, row in rows:
        if row.passed:
            agreed.append(event)
            continue
        before = f"{agreed[-1]} agrees" if agreed else "nothing before was seen"
        if event.side == "in":
            layer = event.layer.rpartition("/")[0]
            where = f"{event} differs, {before}"
            inputs = Event(layer, "in", 0)
            agree = inputs in agreed or not any(e == inputs for e, _ in rows)
        else:
            layer, where = event.layer, f"{event} differs, {before}"
            agree = event._replace(side="in") in agreed or not any(e == event._replace(side="in") for e, _ in rows)
        if not layer:
            layer = "model" if any(e.side == "out" for e in agreed) else "embedding"
        return event, Divergence(quantity, layer, agree, where)
    return None


def _shown(value: float | None) -> str:
    return (
        "" if value is None else "0" if value == 0 else f"{value:.2g}" if 0.01 <= abs(value) < 1000 else f"{value:.1e}"
    )


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
