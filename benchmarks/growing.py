"""The cost of growing: time of a training step of jaxlm over width, depth, context and batch, beside a fitted model.

Each size changes alone, from 4 layers of width 128, 8 rows of 128 tokens (GPT-2's block, heads of 32, vocabulary 65,
float32). After two steps of warm-up all sizes take turns in one process. The times are fitted by

  seconds = a + FLOPs / F + bytes / B

with a, F, B >= 0 and least squares of the relative errors. FLOPs: 6 N + 12 L D T a token, where N counts the weights
of matrix products, the head's included. Bytes: what the backward pass keeps, written and read once, and 4 bytes for
each parameter, eleven times: read forward and backward; the gradient written, read for its norm and for the update;
and weight and moments read and written by the update. An exponent is the slope of log time over log size, from the two
largest.

  python benchmarks/growing.py --figure growing.png --json growing.json
"""

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from common import Reply, environment, environment_lines, progress, spread, train_flops_per_token, write_json

from jaxlm.analysis.costs import activation_bytes_per_sequence, parameter_table
from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.step import init_state, train_step

GRID = {
    "width": [64, 128, 256, 512],
    "depth": [1, 2, 4, 8, 16],
    "context": [32, 64, 128, 256, 512, 1024],
    "batch": [1, 2, 4, 8, 16, 32, 64],
}
SMOKE = {"width": [32, 64], "depth": [1, 2], "context": [8, 16], "batch": [1, 2]}


class Size(NamedTuple):
    """One training step."""

    width: int = 128
    depth: int = 4
    context: int = 128
    batch: int = 8

    @property
    def config(self) -> ModelConfig:
        """The model."""
        sizes = {"embed_dim": self.width, "num_layers": self.depth, "num_heads": self.width // 32}
        return ModelConfig(vocab_size=65, max_seq_len=self.context, **sizes)


class Fit(NamedTuple):
    """What a step is made of, in seconds, seconds a FLOP and seconds a byte."""

    start: float
    flop: float
    byte: float

    def seconds(self, flops: float, bytes_moved: float) -> float:
        """The predicted time of a step."""
        return self.start + flops * self.flop + bytes_moved * self.byte


def bytes_moved(size: Size) -> float:
    """Bytes that a step reads and writes, by the formula above."""
    parameters = sum(count for _, _, count in parameter_table(size.config))
    return 2.0 * size.batch * activation_bytes_per_sequence(size.config) + 11 * 4 * parameters


def training(size: Size) -> Callable[[], float]:
    """A function that takes a step and returns its seconds; two steps are taken here."""
    model = build_model(size.config)
    params = init_params(model, jax.random.key(0))
    tx = build_optimizer(OptimConfig(), 1_000_000, params)
    state = init_state(params, tx)
    windows = jax.random.randint(jax.random.key(1), (size.batch, size.context + 1), 0, size.config.vocab_size)
    step = jax.jit(lambda state, windows: train_step(state, windows, model, tx, 0), donate_argnums=0)

    def take() -> float:
        nonlocal state
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, windows))
        return time.perf_counter() - started

    take()
    take()
    return take


def fit(seconds: np.ndarray, flops: np.ndarray, bytes_moved: np.ndarray) -> Fit:
    """The non-negative a, 1 / F and 1 / B with the least sum of squared relative errors.

    Of every set of terms, the rest being zero, the best solution without a negative number is taken.
    """
    terms = np.stack([np.ones_like(seconds), flops, bytes_moved], axis=1) / seconds[:, None]
    best, error = np.zeros(3), np.inf
    for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        scale = terms[:, chosen].max(axis=0)
        part = np.linalg.lstsq(terms[:, chosen] / scale, np.ones(len(seconds)))[0] / scale
        found = np.square(terms[:, chosen] @ part - 1).sum()
        if found < error and (part >= 0).all():
            best, error = np.zeros(3), found
            best[chosen] = part
    return Fit(*map(float, best))


def measured(base: Size, grid: dict[str, list[int]], rounds: int) -> dict[Size, Reply]:
    """Seconds, FLOPs and bytes of every size of the grid."""
    sizes = dict.fromkeys(size for axis in grid for size in along(base, grid, axis))
    calls = {}
    for size in sizes:
        progress(f"compiles {size}")
        calls[size] = training(size)
    times: dict[Size, list[float]] = {size: [] for size in sizes}
    for i in range(rounds):
        progress(f"round {i + 1} of {rounds}")
        for size, take in calls.items():
            take()  # fills the caches that the others have emptied
            times[size].append(take())
    counts = {size: size.batch * size.context * train_flops_per_token(size.config) for size in sizes}
    return {size: {"seconds": times[size], "flops": counts[size], "bytes": bytes_moved(size)} for size in sizes}


def along(base: Size, grid: dict[str, list[int]], axis: str) -> list[Size]:
    """The sizes that differ from the base in one axis."""
    return [base._replace(**{axis: value}) for value in grid[axis]]


def exponent(values: list[int], seconds: list[float]) -> float:
    """The power with which the time grows between the two largest values."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(values[-1] / values[-2])


def table(rows: dict[Size, Reply], base: Size, grid: dict[str, list[int]], model: Fit) -> None:
    """Every size, and the exponent of each axis."""
    print(f"{'':>8}{'value':>7}{'GFLOP':>9}{'MB':>9}  {'ms a step':28}{'fitted':>9}{'tokens/s':>10}")
    for axis, values in grid.items():
        sizes = along(base, grid, axis)
        for value, size in zip(values, sizes, strict=True):
            row = rows[size]
            seconds, fitted = row["seconds"], model.seconds(row["flops"], row["bytes"])
            print(
                f"{axis:>8}{value:>7}{row['flops'] / 1e9:>9.3f}{row['bytes'] / 1e6:>9.1f}  {spread(seconds, 2, 1e3):28}"
                f"{1e3 * fitted:>9.2f}{size.batch * size.context / median(seconds):>10.0f}"
            )
        times = [median(rows[size]["seconds"]) for size in sizes]
        print(f"{axis:>8} at its end: time grows as {axis}^{exponent(values, times):.2f}")


def draw(path: str, rows: dict[Size, Reply], base: Size, grid: dict[str, list[int]], model: Fit) -> None:
    """The times along each axis, measured and fitted, on logarithmic scales."""
    from matplotlib.figure import Figure  # half a second to import: only when a picture is made

    from jaxlm.run.plots import BLUE, ORANGE, style

    with style():
        figure = Figure(figsize=(9, 7))
        for axes, (axis, values) in zip(figure.subplots(2, 2, sharey=True).flat, grid.items(), strict=True):
            chosen = [rows[size] for size in along(base, grid, axis)]
            times = [1e3 * median(row["seconds"]) for row in chosen]
            fitted = [1e3 * model.seconds(row["flops"], row["bytes"]) for row in chosen]
            axes.loglog(values, times, color=BLUE, marker="o", markersize=5)
            axes.loglog(values, fitted, color=ORANGE, linestyle="--", marker="s", markersize=3)
            above = {"xytext": (-8, 8), "ha": "right", "color": BLUE}
            below = {"xytext": (8, -14), "ha": "left", "color": ORANGE}
            axes.annotate("measured", (values[-1], times[-1]), textcoords="offset points", **above)
            axes.annotate("fitted", (values[0], fitted[0]), textcoords="offset points", **below)
            axes.set_xticks(values, [str(value) for value in values])
            axes.xaxis.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.margins(y=0.15)
            axes.set(xlabel=axis, ylabel="ms a step")
            axes.set_title(f"at its end the time grows as {axis}^{exponent(values, times):.2f}", fontsize=9)
            axes.grid(alpha=0.3)
        others = ", ".join(f"{axis} {value}" for axis, value in base._asdict().items())
        figure.suptitle(f"Time of a training step ({described(model)})\nelsewhere {others}", fontsize=10)
        figure.savefig(path)


def described(model: Fit) -> str:
    """The fit in words."""
    parts = [f"{1e3 * model.start:.2f} ms"] * (model.start > 0)
    parts += [f"FLOPs / {1e-9 / model.flop:.0f} GFLOP/s"] if model.flop else []
    parts += [f"bytes / {1e-9 / model.byte:.1f} GB/s"] if model.byte else []
    return " + ".join(parts)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each size, in turn")
    parser.add_argument("--figure", metavar="FILE", help="path of the picture")
    parser.add_argument("--json", metavar="FILE", help="also write every number there")
    parser.add_argument("--smoke", action="store_true", help="very small sizes, one round: does the script run?")
    arguments = parser.parse_args()
    base, grid, rounds = Size(), GRID, arguments.rounds
    if arguments.smoke:
        print("very small sizes: these numbers say nothing about speed")
        base, grid, rounds = Size(width=32, depth=1, context=8, batch=1), SMOKE, 1
    found = environment("jax", "jaxlib")
    rows = measured(base, grid, rounds)
    columns = zip(*((median(row["seconds"]), row["flops"], row["bytes"]) for row in rows.values()), strict=True)
    seconds, flops, moved = map(np.array, columns)
    model = fit(seconds, flops, moved)
    errors = np.abs(model.seconds(flops, moved) / seconds - 1)
    print(f"{jax.devices()[0].device_kind}: {environment_lines(found)}")
    print(f"medians (least to most) of {rounds} rounds in turn")
    print(f"a step takes {described(model)}; error of the fit: median {np.median(errors):.0%}, most {errors.max():.0%}")
    table(rows, base, grid, model)
    if arguments.figure:
        draw(arguments.figure, rows, base, grid, model)
    sizes = [{**size._asdict(), **row} for size, row in rows.items()]
    write_json(arguments.json, {"environment": found, "rounds": rounds, "fit": model._asdict(), "sizes": sizes})


if __name__ == "__main__":
    main()
