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
    """The steps that all seeds were evaluated at, and the losses there as the mean over the seeds."""
    column = {"train": 1, "val": 2}[split]
    curves = [{point[0]: point[column] for point in record["curve"]} for record in records]
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    return steps, [statistics.mean(curve[step] for curve in curves) for step in steps]


def draw_curves(
    axes: "Axes",
    curves: dict[str, tuple[list[int], list[float]]],
    published: dict[str, float] | None = None,
    top: float | None = None,
    colors: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Losses against the step, each named where it ends, and published losses as dashed lines.

    Args:
      curves: name -> steps, losses.
      published: name of a curve -> the loss that was published for it.
      colors: name of a curve -> colour and marker, where they are not those of its place.
      top: larger losses leave the picture, unless a curve ends there.
    """
    published = published or {}
    ends = []
    for (name, (steps, losses)), style in zip(curves.items(), zip(COLORS, MARKERS, strict=True), strict=False):
        color, marker = (colors or {}).get(name, style)
        axes.plot(steps, losses, color=color, marker=marker, markersize=4)
        label = f"{name} {losses[-1]:.3f}"
        if name in published:
            axes.axhline(published[name], color=color, linestyle="--", linewidth=1)
            label += f" (published {published[name]:.3f})"
        ends.append((losses[-1], label, color))
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    if top is not None:
        axes.set_ylim(top=max(top, *(1.05 * loss for loss, *_ in ends)))
    label_ends(axes, ends)
