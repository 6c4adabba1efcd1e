"""Plots and tables made from what a run wrote."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from jaxlm.run.metrics import Row

MOST_LABELS = 48
"""Attention maps of more tokens are drawn without them: they would not be legible."""


def plot_loss(rows: list[Row], path: Path, title: str) -> None:
    """Draws training loss, and validation loss where it was measured, against the step; nats a token."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is made

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    batches = [row for row in rows if "loss" in row]
    axes.plot(
        [r["step"] for r in batches],
        [r["loss"] for r in batches],
        color="tab:blue",
        alpha=0.35,
        linewidth=0.8,
        label="training batch",
    )
    evaluations = [row for row in rows if "val_loss" in row]
    for key, label, color in (("train_loss", "training slice", "tab:blue"), ("val_loss", "validation", "tab:orange")):
        axes.plot([r["step"] for r in evaluations], [r[key] for r in evaluations], "o-", color=color, label=label)
    if evaluations:
        last = evaluations[-1]
        axes.annotate(
            f"{last['val_loss']:.3f}", (last["step"], last["val_loss"]), (0, 8), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_attention_maps(maps: list[Float[np.ndarray, "heads T T"]], labels: list[str], path: Path, title: str) -> None:
    """Draws every layer's (row) every head's (column) weights: query down, key across, white 0 to dark 1."""
    from matplotlib.figure import Figure

    columns = max(len(layer) for layer in maps)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.6 * len(maps) + 0.5), layout="constrained")
    grid = figure.subplots(len(maps), columns, squeeze=False)
    if len(labels) > MOST_LABELS:
        labels = []
    for i, layer in enumerate(maps):
        for head, axes in enumerate(grid[i]):
            image = axes.imshow(layer[head], vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"layer {i}, head {head}", fontsize=8)
            for set_ticks in (axes.set_xticks, axes.set_yticks):
                set_ticks(range(len(labels)), labels, fontsize=6, parse_math=False)
    figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
    figure.suptitle(title, fontsize=9, parse_math=False)
    figure.savefig(path, dpi=120)


def plot_masks(rows: dict[str, list[tuple[str, Bool[np.ndarray, "T T"]]]], path: Path) -> None:
    """Draws rows of equally many named masks: query down, key across, dark where it is seen."""
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.9 * columns, 2.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, masks) in zip(grid, rows.items(), strict=True):
        for axes, (label, mask) in zip(line, masks, strict=True):
            axes.imshow(mask, vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"{label}\n{name}", fontsize=8)
            axes.set_axis_off()
    figure.savefig(path, dpi=120)
