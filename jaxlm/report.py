"""Plots and tables made from what a run wrote."""

from pathlib import Path

import jax

from jaxlm.config import ModelConfig
from jaxlm.metrics import Row
from jaxlm.model import build_model, init_params


def parameter_table(cfg: ModelConfig) -> list[tuple[str, tuple[int, ...], int]]:
    """(path, shape, count) of every parameter of a model, without making one."""
    shapes = jax.eval_shape(lambda: init_params(build_model(cfg), jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf.shape, leaf.size) for p, leaf in leaves]


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
