"""Pictures of runs: the loss curve, attention maps, masks.

Every picture has an opaque background of a middle tone, which suits pages with a light and with a dark theme. Its
colours are safe for colour-blind readers. matplotlib takes half a second to import: only what draws imports it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from jaxlm.run.metrics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B7280"
"""Two colours of the palette of Okabe and Ito, and a grey."""

BACKGROUND, PAPER, INK, DARK = "#D9DEE4", "#E9ECF0", "#1F2933", "#0B3C6F"
"""Around the axes, inside them, text, and the colour of 1 in a map whose 0 is that of the paper."""

DENSE_LABELS, MOST_LABELS = 40, 80
"""An attention map of more tokens than the first labels every second one, of more than the second only positions."""


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Figures made and saved inside look like the pictures of this module."""
    import matplotlib

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inked, INK),
        "figure.facecolor": BACKGROUND,
        "axes.facecolor": PAPER,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 120,
        "text.parse_math": False,  # the name of a run and a token may hold $
    }
    with matplotlib.rc_context(settings):
        yield


def plot_loss(rows: list[Row], path: Path, run: str) -> None:
    """Draws a run's training loss, and validation loss where it was measured, against the step; nats a token."""
    with style():
        loss_figure(rows, run).savefig(path)


def loss_figure(rows: list[Row], run: str) -> "Figure":
    """The picture of `plot_loss`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"Loss of run {run}")
    axes.grid(alpha=0.3)
    ends = []
    for key, name, color, marker in (
        ("loss", "training batches", GREY, ""),
        ("train_loss", "training slice", BLUE, "o"),
        ("val_loss", "validation", ORANGE, "s"),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=1.5 if marker else 0.8)
            ends.append((points[-1][1], f"{name} {points[-1][1]:.3f}" if marker else name, color))
    label_ends(axes, ends)
    return figure


def label_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Names curves where they end instead of in a legend, which would cover them.

    Args:
      ends: the last y of each curve, its name and its colour. Names that would overlap move up.
    """
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.figure.bbox.height / axes.figure.dpi  # the height of the axes, about
    line = 0.19 * (high - low) / inches
    place = -math.inf
    for y, name, color in sorted(ends):
        place = max(y, place + line)
        axes.annotate(
            name,
            (1, place),
            (6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=color,
        )
    axes.set_ylim(low, high)


def plot_attention_maps(maps: list[Float[np.ndarray, "heads T T"]], labels: list[str], path: Path, run: str) -> None:
    """Draws every layer's (row) every head's (column) weights: query down, key across, light 0 to dark 1."""
    with style():
        attention_figure(maps, labels, run).savefig(path)


def attention_figure(maps: list[Float[np.ndarray, "heads T T"]], labels: list[str], run: str) -> "Figure":
    """The picture of `plot_attention_maps`."""
    from matplotlib.figure import Figure

    columns = max(len(layer) for layer in maps)
    side = min(max(2.2, 0.1 * len(labels)), 0.1 * DENSE_LABELS)  # inches; a label needs 0.1
    figure = Figure(figsize=(side * columns + 1.5, side * len(maps) + 1))
    grid = figure.subplots(len(maps), columns, squeeze=False)
    shown = range(0, len(labels), math.ceil(len(labels) / DENSE_LABELS)) if len(labels) <= MOST_LABELS else None
    for i, layer in enumerate(maps):
        for head, axes in enumerate(grid[i]):
            image = axes.imshow(layer[head], vmin=0, vmax=1, cmap=_light_to_dark())
            axes.set_title(f"layer {i}, head {head}", fontsize=8)
            axes.tick_params(labelsize=6, length=2)
            if shown is not None:
                texts = [labels[position] for position in shown]
                upright = all(len(text) == 1 for text in texts)
                axes.set_xticks(shown, texts, rotation=0 if upright else 90)
                axes.set_yticks(shown, texts)
    for axes in grid[:, 0]:
        axes.set_ylabel("query", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("key", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="weight (those of a query sum to 1)")
    figure.suptitle(f"Attention weights of {run}", wrap=True)
    return figure


def plot_masks(rows: dict[str, list[tuple[str, Bool[np.ndarray, "T T"]]]], path: Path, title: str) -> None:
    """Draws rows of equally many masks, the same names in each row: query down, key across, dark where it is seen."""
    with style():
        masks_figure(rows, title).savefig(path)


def masks_figure(rows: dict[str, list[tuple[str, Bool[np.ndarray, "T T"]]]], title: str) -> "Figure":
    """The picture of `plot_masks`."""
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.9 * columns + 0.6, 2 * len(rows) + 0.8))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, (name, masks) in enumerate(rows.items()):
        for axes, (label, mask) in zip(grid[i], masks, strict=True):
            axes.imshow(mask, vmin=0, vmax=1, cmap=_light_to_dark())
            axes.set(xticks=range(0, len(mask), 5), yticks=range(0, len(mask), 5))
            axes.tick_params(labelsize=6, length=2)
            if i == 0:
                axes.set_title(label, fontsize=9)
        grid[i, 0].set_ylabel(f"{name}\nquery", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("key", fontsize=9)
    figure.suptitle(title, wrap=True)
    return figure


def _light_to_dark() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("light to dark", [PAPER, DARK])
