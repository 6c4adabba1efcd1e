"""What the pictures of the experiments share: curves named at their ends, published values as dashed lines."""

import statistics
from typing import TYPE_CHECKING

from jaxlm.reproduce.rows import Numbers
from jaxlm.run.plots import BLUE, GREY, INK, ORANGE, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#7A5195", GREY, INK)
"""Colours that colour-blind readers tell apart: those of Okabe and Ito that stand out from a middle tone, and two."""

MARKERS = "osD^vPX"


def mean_curve(records: list[Numbers], split: str = "val") -> tuple[list[int], list[float]]:
    """Steps and the losses at them, as the mean over the seeds."""
    column = {"train": 1, "val": 2}[split]
    curves = [record["curve"] for record in records]
    steps = [point[0] for point in curves[0]]
    return steps, [statistics.mean(curve[i][column] for curve in curves) for i in range(len(steps))]


def draw_curves(
    axes: "Axes",
    curves: dict[str, tuple[list[int], list[float]]],
    published: dict[str, float] | None = None,
    top: float | None = None,
) -> None:
    """Losses against the step, each named where it ends, and published losses as dashed lines.

    Args:
      curves: name -> steps, losses.
      published: name of a curve -> the loss that was published for it.
      top: larger losses leave the picture, unless a curve ends there.
    """
    published = published or {}
    ends = []
    for (name, (steps, losses)), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
        axes.plot(steps, losses, color=color, marker=marker, markersize=4)
        ends.append((losses[-1], f"{name} {losses[-1]:.3f}", color))
        if name in published:
            axes.axhline(published[name], color=color, linestyle="--", linewidth=1)
            axes.annotate(
                f"published {published[name]:.3f}",
                (0.02, published[name]),
                (0, 3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                color=color,
                fontsize=8,
            )
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    if top is not None:
        axes.set_ylim(top=max(top, *(1.05 * loss for loss, *_ in ends)))
    label_ends(axes, ends)
