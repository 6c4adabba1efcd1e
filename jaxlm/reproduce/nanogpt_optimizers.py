"""A report on nanoGPT's optimizers: AdamW, AdamSN, Adafactor, SGD and mean-pooled groups on nanogpt-cpu.

The report's numbers are those of its one seed. Its Adam has b2 0.999, its model biases and a vocabulary of 50,304, and
its AdamSN subsets linear layers only.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxlm.config import ExperimentConfig, OptimConfig
from jaxlm.config.presets import preset
from jaxlm.reproduce.rows import THREE_SEEDS, Experiment, Numbers, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NONE: dict[str, float] = {}
_NOTHING: dict[str, Any] = {}
_NOTE = "The published runs have Adam with b2 0.999, biases and a vocabulary of 50,304"


def _config(optim: OptimConfig, eval_every: int = 500, **model: Any) -> ExperimentConfig:
    base = preset("nanogpt-cpu")
    train = dataclasses.replace(base.train, eval_every=eval_every, keep=1)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model), optim=optim, train=train)


def _adamsn(rate: float, **fields: Any) -> OptimConfig:
    """One number for each output of a kernel, unless told otherwise."""
    return OptimConfig(name="adamsn", learning_rate=rate, **{"subset": "per_output", **fields})


def _subsets(size: int) -> OptimConfig:
    """AdamSN over `size` inputs of an output, sqrt(size) times Adam's 6e-3, which the rest keeps."""
    ratio = size**-0.5
    return _adamsn(6e-3 / ratio, adam_lr_ratio=ratio, arguments=(f"subset_size={size}",))


def _row(name: str, label: str, optim: OptimConfig, *, model: dict[str, Any] | None = None, **fields: Any) -> Training:
    return Training(name=name, label=label, config=_config(optim, **(model or {})), seeds=THREE_SEEDS, **fields)


def _val(loss: float) -> dict[str, float]:
    return {"val_loss": loss}


def _published_rows() -> list[Training]:
    """nanoGPT's settings, which are our defaults: warm-up 100, cosine to a tenth, decay 0.1, b2 0.99, clipping at 1."""
    adamw = OptimConfig(learning_rate=1e-3)
    sample: dict[str, Any] = {"prompts": ("\n",)}
    return [
        _row(
            "adamw-1e-3",
            "AdamW 1e-3",
            adamw,
            published=_val(1.9353),
            targets=_val(1.91),
            note=f"{_NOTE}; nanoGPT's README has 1.88 on random batches",
            **sample,
        ),
        *(
            _row(f"adamw-{rate:g}", f"AdamW {rate:g}", OptimConfig(learning_rate=rate), targets=targets)
            for rate, targets in ((3e-3, _NONE), (6e-3, _val(1.76)), (1e-2, _NONE))
        ),
        _row(
            "adam-1e-3",
            "Adam 1e-3, no decay, b2 0.999",
            OptimConfig(name="adam", learning_rate=1e-3, b2=0.999),
            published=_val(1.9353),
            targets=_val(1.9353),
            note="The published runs have biases and a vocabulary of 50,304",
            **sample,
        ),
        *(
            _row(
                f"adamsn-same-rate{suffix}",
                f"AdamSN 1e-2, {text}, Adam at the same rate",
                _adamsn(1e-2, adam_lr_ratio=1.0, subset=subset),
                published=_val(2.3416),
                targets=_val(1.93),
                note="The published run has AdamSN on linear layers, a number for each entry of the smaller dimension",
                **sample,
            )
            for suffix, subset, text in (
                ("", "per_output", "one number for each output"),
                ("-smaller", "smaller", "one for each entry of the smaller dimension"),
            )
        ),
        *(
            _row(f"adamsn-{rate:g}", f"AdamSN {rate:g}, Adam at {adam:g}", _adamsn(rate, adam_lr_ratio=adam / rate))
            for rate, adam in ((1e-2, 1e-3), (2e-2, 2e-3), (3e-2, 3e-3), (6e-2, 6e-3), (1e-1, 6e-3))
        ),
        *(
            _row(f"adamsn-{name}", f"AdamSN 3e-2, {text}", _adamsn(3e-2, subset=name.replace("-", "_")))
            for name, text in (
                ("per-input", "one number for each input"),
                ("auto", "one for each entry of the larger dimension"),
                ("smaller", "one for each entry of the smaller dimension"),
            )
        ),
        *(
            _row(f"adamsn-subsets-{size}", f"AdamSN, subsets of {size} inputs", _subsets(size))
            for size in (8, 16, 32, 128)
        ),
        _row(
            "adafactor-1e-3",
            "Adafactor 1e-3",
            OptimConfig(name="adafactor", learning_rate=1e-3),
            published=_val(1.9338),
            targets=_val(1.9338),
            note="The published runs have biases and a vocabulary of 50,304",
            **sample,
        ),
        *(
            _row(
                f"adafactor-{rate:g}",
                f"Adafactor {rate:g}",
                OptimConfig(name="adafactor", learning_rate=rate),
                targets=targets,
            )
            for rate, targets in ((3e-3, _val(1.79)), (6e-3, _NONE))
        ),
        *(
            _row(
                f"sgd-{rate:g}",
                f"SGD {rate:g}",
                OptimConfig(name="sgd", learning_rate=rate, weight_decay=1e-4),
                note="Weight decay 1e-4, for it is multiplied by the rate",
                **sample,
            )
            for rate in (0.1, 1.0)
        ),
        *(
            _row(
                f"mean-pooled-{groups}",
                f"AdamW 1e-3, {groups} mean-pooled group{'s' if groups > 1 else ''}",
                adamw,
                model={"num_kv_heads": groups, "kv_sharing": "mean_pooled"},
                **more,
            )
            for groups, more in (
                (1, _NOTHING),
                (2, {"published": {"val_loss": 1.9180, "train_loss": 1.7875}, "targets": _val(1.90), "note": _NOTE}),
            )
        ),
    ]


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """An optimizer under the best settings besides the rate, as measured (docs/log.md)."""

    name: str
    rates: tuple[float, ...]
    best: float
    """The rate that is trained under three seeds."""
    fields: dict[str, Any]
    best_row: dict[str, Any] = dataclasses.field(default_factory=dict)

    def row_name(self, rate: float) -> str:
        return f"sweep-{self.name.lower().replace(', ', '-')}-{rate:g}"

    def rows(self) -> list[Training]:
        return [
            Training(
                name=self.row_name(rate),
                label=f"sweep: {self.name} {rate:g}",
                config=_config(OptimConfig(learning_rate=rate, warmup_steps=200, **self.fields), eval_every=250),
                seeds=THREE_SEEDS if rate == self.best else (0,),
                **(self.best_row if rate == self.best else {}),
            )
            for rate in self.rates
        ]


_NEAR_ADAMW = {"below": ("sweep-adamw-0.005", 0.02)}
_SWEEPS = (
    _Sweep("AdamW", (2e-3, 3.5e-3, 5e-3, 7e-3), 5e-3, {"weight_decay": 0.2}, {"targets": _val(1.76)}),
    _Sweep("AdamSN", (3e-2, 4.5e-2, 6e-2, 8e-2), 4.5e-2, {"name": "adamsn", "weight_decay": 0.2}, _NEAR_ADAMW),
    _Sweep("Adafactor", (2e-3, 3e-3, 4.5e-3), 3e-3, {"name": "adafactor", "weight_decay": 0.2}, _NEAR_ADAMW),
    _Sweep(
        "Adafactor, momentum",
        (4e-3, 6e-3, 9e-3),
        6e-3,
        {"name": "adafactor", "arguments": ("momentum=0.9", "clipping_threshold=1")},
        _NEAR_ADAMW,
    ),
    _Sweep("SGD", (0.3, 1.0, 3.0), 3.0, {"name": "sgd", "weight_decay": 1e-4}),
)


def _draw(records: dict[str, list[Numbers]]) -> "Figure | None":
    """Validation loss against the rate, the step and the bytes of the optimizer's state."""
    import statistics

    from matplotlib.figure import Figure

    from jaxlm.reproduce.pictures import COLORS, MARKERS, draw_curves, mean_curve
    from jaxlm.run.plots import label_ends

    done = [sweep for sweep in _SWEEPS if all(records[sweep.row_name(rate)] for rate in sweep.rates)]
    if not done:
        return None
    figure = Figure(figsize=(17, 4.5))
    by_rate, by_step, by_bytes = figure.subplots(1, 3)
    ends: list[tuple[float, str, str]] = []
    sizes: list[tuple[float, str, str]] = []
    bests = {}
    for sweep, color, marker in zip(done, COLORS, MARKERS, strict=False):
        losses = [records[sweep.row_name(rate)][0]["val_loss"] for rate in sweep.rates]
        by_rate.plot(sweep.rates, losses, color=color, marker=marker)
        ends.append((losses[-1], sweep.name, color))
        best = records[sweep.row_name(sweep.best)]
        bests[sweep.name] = best
        size, mean = max(best[0]["state_bytes"], 1), statistics.mean(record["val_loss"] for record in best)
        by_bytes.plot([size], [mean], color=color, marker=marker, linestyle="")
        sizes.append((mean, f"{sweep.name} {mean:.3f}", color))
    by_rate.set(xscale="log", xlabel="peak learning rate", title="by rate, seed 0", ylim=(None, 2.2))
    by_rate.set_ylabel("validation loss (nats per token)")
    by_rate.grid(alpha=0.3)
    label_ends(by_rate, ends)
    draw_curves(by_step, {name: mean_curve(best) for name, best in bests.items()}, top=2.6)
    by_step.set(title="by step, best rate")
    by_bytes.set(xscale="log", xlabel="bytes of optimizer state", title="by memory, best rate")
    by_bytes.set_xticks([1e1, 1e3, 1e5, 1e7], ["10", "1,000", "100,000", "10 million"])
    by_bytes.minorticks_off()
    by_rate.xaxis.set_major_formatter("{x:g}")
    by_rate.xaxis.set_minor_formatter("")
    by_bytes.margins(0.15)
    by_bytes.grid(alpha=0.3)
    label_ends(by_bytes, sizes)
    return figure


EXPERIMENT = Experiment(
    name="nanogpt-optimizers",
    title="A report on nanoGPT's optimizers (nanogpt-cpu, 2000 steps)",
    rows=(*_published_rows(), *(row for sweep in _SWEEPS for row in sweep.rows())),
    side_by_side=True,
    draw=_draw,
)
