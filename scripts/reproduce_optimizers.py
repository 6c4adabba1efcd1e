"""Trains nanogpt-cpu with every optimizer: the published comparison, a sweep of rates, three seeds at the best one.

    python scripts/reproduce_optimizers.py [--out runs/optimizers] [--parts published sweep epoch] [--share 1/1]

Each training is a run folder under --out; a finished one is not trained again, one that was stopped goes on. Processes
with --share 1/2 and 2/2 halve the work; a last call without --share trains what is left and reports. Written are
OUT/table.md, docs/optimizers.png (validation loss against rate, step and bytes of optimizer state) and
docs/adam-sgd.png (Adam against SGD over one epoch). All trainings together: about 65 minutes on two cores.
"""

import argparse
import dataclasses
import statistics
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from jaxlm import preset
from jaxlm.config import ExperimentConfig, OptimConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer, state_bytes
from jaxlm.run import metrics
from jaxlm.run.folder import read_config
from jaxlm.run.training import train

BASE = preset("nanogpt-cpu")
SEEDS = (0, 1, 2)
EPOCH_STEPS = 1_003_854 // (BASE.train.batch_size * BASE.model.max_seq_len)


def experiment(optim: OptimConfig, seed: int = 0, eval_every: int = 2000, **model: Any) -> ExperimentConfig:
    """nanogpt-cpu, 2000 steps, under an optimizer."""
    return dataclasses.replace(
        BASE,
        model=dataclasses.replace(BASE.model, **model),
        optim=optim,
        train=dataclasses.replace(BASE.train, seed=seed, eval_every=eval_every, checkpoint_every=1000, keep=1),
    )


def published(name: str, rate: float, **fields: Any) -> OptimConfig:
    """nanoGPT's settings, which are the defaults: warm-up 100, cosine to a tenth, decay 0.1, b2 0.99, clipping at 1."""
    return OptimConfig(name=name, learning_rate=rate, **fields)


def per_output(rate: float, **fields: Any) -> OptimConfig:
    """AdamSN as the reports have it: one number for each output of a kernel."""
    return published("adamsn", rate, subset="per_output", **fields)


def subsets(size: int) -> OptimConfig:
    """AdamSN over `size` inputs of an output, sqrt(size) times Adam's 6e-3, which the rest keeps."""
    ratio = size**-0.5
    return per_output(6e-3 / ratio, adam_lr_ratio=ratio, arguments=(f"subset_size={size}",))


PUBLISHED: dict[str, tuple[ExperimentConfig, str]] = {
    "adamw 0.001": (experiment(published("adamw", 1e-3)), "1.9353"),
    "adamsn 0.01, adam at the same rate": (experiment(per_output(1e-2, adam_lr_ratio=1.0)), "2.3416"),
    "adafactor 0.001": (experiment(published("adafactor", 1e-3)), "1.9338"),
    "adamw 0.001, two mean-pooled groups": (
        experiment(published("adamw", 1e-3), num_kv_heads=2, kv_sharing="mean_pooled"),
        "1.9180",
    ),
    **{f"adamw {rate:g}": (experiment(published("adamw", rate)), "") for rate in (3e-3, 6e-3, 1e-2)},
    **{f"adafactor {rate:g}": (experiment(published("adafactor", rate)), "") for rate in (3e-3, 6e-3)},
    **{f"adamsn {rate:g}": (experiment(per_output(rate)), "") for rate in (1e-2, 2e-2, 3e-2, 6e-2, 1e-1)},
    "adamsn 0.03, per input": (experiment(published("adamsn", 3e-2, subset="per_input")), ""),
    "adamsn 0.03, auto": (experiment(published("adamsn", 3e-2, subset="auto")), ""),
    **{f"adamsn, subsets of {size}": (experiment(subsets(size)), "") for size in (8, 16, 32, 128)},
    **{f"sgd {rate:g}": (experiment(published("sgd", rate)), "") for rate in (0.1, 1.0)},
}
"""Label -> its training and the validation loss published for it."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """An optimizer's best settings besides the rate, as measured (docs/log.md), and the rates of its sweep."""

    rates: tuple[float, ...]
    fields: dict[str, Any]

    def config(self, rate: float, seed: int = 0) -> ExperimentConfig:
        """The training at one rate."""
        return experiment(OptimConfig(learning_rate=rate, warmup_steps=200, **self.fields), seed, eval_every=250)


SWEEP = {
    "AdamW": Swept((2e-3, 3.5e-3, 5e-3, 7e-3), {"name": "adamw", "weight_decay": 0.2}),
    "AdamSN": Swept((3e-2, 4.5e-2, 6e-2, 8e-2), {"name": "adamsn", "weight_decay": 0.2}),
    "Adafactor": Swept((2e-3, 3e-3, 4.5e-3), {"name": "adafactor", "weight_decay": 0.2}),
    "Adafactor, momentum": Swept(
        (4e-3, 6e-3, 9e-3), {"name": "adafactor", "arguments": ("momentum=0.9", "clipping_threshold=1")}
    ),
    "SGD": Swept((0.3, 1.0, 3.0), {"name": "sgd", "weight_decay": 1e-4}),
}


def epoch(name: str, rate: float) -> ExperimentConfig:
    """One epoch at a constant rate, as in 15-780: no warm-up, decay or clipping; losses of every step."""
    optim = OptimConfig(
        name=name, learning_rate=rate, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None
    )
    config = experiment(optim, eval_every=250)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=EPOCH_STEPS))


EPOCH = {
    "Adam 0.001": epoch("adam", 1e-3),
    **{f"SGD {rate:g}": epoch("sgd", rate) for rate in (1e-3, 0.1, 1.0)},
}


@dataclasses.dataclass
class Bench:
    """The trainings under one folder: each is done once, and of those still to do this process does its share."""

    out: Path
    share: tuple[int, int]

    def rows(self, label: str, config: ExperimentConfig) -> list[metrics.Row]:
        """The rows of a training's metrics, trained now if it is this process' to do; else as far as they go."""
        folder = self.out / label.replace(",", "").replace(" ", "-")
        index, count = self.share
        ours = zlib.crc32(label.encode()) % count == index - 1  # the same for all processes, whatever they have seen
        made = read_config(folder) if (folder / "config.json").exists() else config
        if (made.optim, made.model) != (config.optim, config.model):
            sys.exit(f"{folder} holds a training with other settings: choose another --out")
        if ours and last_loss(metrics.read_rows(folder / "metrics.jsonl"), config) is None:
            print(f"-- {label}", file=sys.stderr)
            if train(config, folder, resume=(folder / "config.json").exists()).signum is not None:
                sys.exit(130)
        return metrics.read_rows(folder / "metrics.jsonl")

    def loss(self, label: str, config: ExperimentConfig) -> float | None:
        """The exact validation loss after the last step, in nats a token; None where it is not trained yet."""
        return last_loss(self.rows(label, config), config)


def last_loss(rows: list[metrics.Row], config: ExperimentConfig) -> float | None:
    """The validation loss of the last step, if that is there."""
    return next((row["val_loss"] for row in rows if row["step"] == config.train.steps and "val_loss" in row), None)


def optimizer_bytes(config: ExperimentConfig) -> int:
    """What the optimizer keeps for the model, in bytes."""
    model = build_model(config.model)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return state_bytes(build_optimizer(config.optim, config.train.steps, shapes), shapes)


def published_table(bench: Bench) -> list[str]:
    """Every row of the published comparison, as lines of Markdown."""
    lines = ["| run | published val | val | state bytes |", "| --- | ---: | ---: | ---: |"]
    for label, (config, reported) in PUBLISHED.items():
        loss = bench.loss(f"published {label}", config)
        lines.append(
            f"| {label} | {reported} | {'' if loss is None else f'{loss:.4f}'} | {optimizer_bytes(config):,} |"
        )
    return lines


def sweep_table(bench: Bench, figure: Path) -> list[str]:
    """Rates of each optimizer, then all seeds at its best one, as lines of Markdown; draws them if all is there."""
    lines = ["| optimizer | state bytes | share | val loss by rate, seed 0 | at the best rate, seeds 0, 1, 2 | mean |"]
    lines.append("| --- | ---: | ---: | --- | --- | ---: |")
    found: dict[str, dict[str, Any]] = {}
    adamw_bytes = optimizer_bytes(SWEEP["AdamW"].config(1e-3))
    for name, swept in SWEEP.items():
        by_rate = {rate: bench.loss(f"{name} {rate:g} seed 0", swept.config(rate)) for rate in swept.rates}
        known = {rate: loss for rate, loss in by_rate.items() if loss is not None}
        if len(known) < len(swept.rates):  # the best rate is known once all are
            continue
        best = min(known, key=known.__getitem__)
        rows = [bench.rows(f"{name} {best:g} seed {seed}", swept.config(best, seed)) for seed in SEEDS]
        losses = [last_loss(r, swept.config(best)) for r in rows]
        if None in losses:
            continue
        size = optimizer_bytes(swept.config(best))
        found[name] = {"by_rate": known, "rows": rows, "mean": statistics.mean(losses), "bytes": size, "best": best}
        sweep = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in known.items())
        seeds = f"{best:g}: " + ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(
            f"| {name} | {size:,} | {size / adamw_bytes:.1%} | {sweep} | {seeds} | {found[name]['mean']:.4f} |"
        )
    if len(found) == len(SWEEP):
        draw_sweep(found, figure)
    return lines


def draw_sweep(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Validation loss against the rate, the step and the bytes of the optimizer's state."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_rate, by_step, by_bytes = figure.subplots(1, 3)
    for name, result in found.items():
        by_rate.plot(list(result["by_rate"]), list(result["by_rate"].values()), "o-", label=name)
        evaluations = [[row["val_loss"] for row in rows if "val_loss" in row] for rows in result["rows"]]
        steps = [row["step"] for row in result["rows"][0] if "val_loss" in row]
        means = [statistics.mean(column) for column in zip(*evaluations, strict=True)]
        by_step.plot(steps, means, "o-", label=f"{name}, {result['best']:g}")
        by_bytes.plot([max(result["bytes"], 1)], [result["mean"]], "o", label=f"{name}, {result['mean']:.3f}")
    by_rate.set(xscale="log", xlabel="peak rate", title="2000 steps, seed 0")
    by_step.set(xlabel="step", title="best rate, mean of three seeds")
    by_bytes.set(xscale="log", xlabel="bytes of optimizer state", title="best rate, mean of three seeds")
    for axes in (by_rate, by_step, by_bytes):
        axes.set(ylabel="validation loss (nats a character)")
        axes.grid(alpha=0.3)
        axes.legend()
    by_rate.set_ylim(top=2.2)
    by_step.set_ylim(top=2.6)
    figure.savefig(path, dpi=110)


def epoch_table(bench: Bench, figure: Path) -> list[str]:
    """Adam against SGD after one epoch, as lines of Markdown; draws their curves if all is there."""
    lines = [f"| one epoch ({EPOCH_STEPS} steps), constant rate | val loss |", "| --- | ---: |"]
    curves = {label: bench.rows(f"epoch {label}", config) for label, config in EPOCH.items()}
    losses = {label: last_loss(curves[label], config) for label, config in EPOCH.items()}
    lines += [f"| {label} | {loss:.4f} |" for label, loss in losses.items() if loss is not None]
    if None not in losses.values():
        picture = Figure(figsize=(7, 4), layout="constrained")
        axes = picture.add_subplot()
        for label, rows in curves.items():
            batches = [row for row in rows if "loss" in row]
            (line,) = axes.plot([r["step"] for r in batches], [r["loss"] for r in batches], alpha=0.3, linewidth=0.8)
            tests = [row for row in rows if "val_loss" in row]
            named = {"color": line.get_color(), "label": f"{label}: {losses[label]:.3f}"}
            axes.plot([r["step"] for r in tests], [r["val_loss"] for r in tests], "o-", **named)
        axes.set(
            xlabel="step", ylabel="loss (nats a character)", title="one epoch: training batches and validation (dots)"
        )
        axes.set_ylim(1.8, 4.4)  # what diverges leaves the picture
        axes.grid(alpha=0.3)
        axes.legend()
        picture.savefig(figure, dpi=110)
    return lines


def main() -> None:
    """Trains what is not done yet, then writes the table and the figures of what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--share", default="1/1", type=share, metavar="K/N", help="train the K-th of N shares only")
    parser.add_argument("--figures", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    bench, lines = Bench(arguments.out, arguments.share), []
    for part in arguments.parts:
        make, figure = PARTS[part]
        lines += [*make(bench, arguments.figures / figure), ""]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def share(text: str) -> tuple[int, int]:
    """K/N as two numbers, 1 <= K <= N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give K/N with 1 <= K <= N, such as 1/2")
    return int(index), int(count)


PARTS = {
    "published": (lambda bench, figure: published_table(bench), ""),
    "sweep": (sweep_table, "optimizers.png"),
    "epoch": (epoch_table, "adam-sgd.png"),
}

if __name__ == "__main__":
    main()
