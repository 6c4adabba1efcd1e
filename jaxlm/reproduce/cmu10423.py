"""CMU 10-423: learned positions and RoPE, a longer context, grouped queries, sliding windows, on chargpt."""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxlm.config import ExperimentConfig, ModelConfig
from jaxlm.config.presets import preset
from jaxlm.reproduce.rows import THREE_SEEDS, Experiment, Measurement, Numbers, Training, changed_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS, HEADS_BATCH = (1, 2, 3, 6), 16
FORMS = ("grouped", "summed_scores")
LENGTHS, WINDOWS = (512, 1024, 2048, 4096, 8192), (32, 128, 512)


def _chargpt(steps: int = 600, **model: Any) -> ExperimentConfig:
    base = preset("chargpt")
    train = dataclasses.replace(base.train, steps=steps, eval_every=50, checkpoint_every=50)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model), train=train)


def _heads_model(heads: int, form: Any) -> ModelConfig:
    model = _chargpt(position="rope", num_kv_heads=heads, kv_sharing=form).model
    return dataclasses.replace(model, dropout=0.0, attention_dropout=0.0)


_MODEL = _heads_model(6, "grouped")


def _heads(quick: bool) -> Numbers:
    """Time and memory of a training step over the key/value heads, in both forms; each in a process of its own."""
    from jaxlm.reproduce.step_cost import measured_step

    found: dict[str, dict[str, dict[str, float]]] = {}
    for form in FORMS:
        for heads in HEADS:
            sizes: dict[str, Any] = {"num_layers": 1, "max_seq_len": 16} if quick else {}
            config = dataclasses.replace(
                _chargpt(),
                model=dataclasses.replace(_heads_model(heads, form), **sizes),
                train=dataclasses.replace(_chargpt().train, batch_size=2 if quick else HEADS_BATCH),
            )
            found.setdefault(form, {})[str(heads)] = measured_step(config, 2 if quick else 7)
    header = (
        "| form | key/value heads | step, ms | compiled, MB | peak resident, MB | before attention, MB | after it, MB |"
    )
    rows = [header, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for form, by_heads in found.items():
        for count, cost in by_heads.items():
            names = ("compiled_bytes", "resident_bytes", "before_attention_bytes", "after_attention_bytes")
            memory = " | ".join(f"{cost[name] / 1e6:.1f}" for name in names)
            rows.append(f"| {form} | {count} | {cost['step_ms']:.0f} | {memory} |")
    times = {
        f"{form}_{count}_step_ms": cost["step_ms"]
        for form, by_heads in found.items()
        for count, cost in by_heads.items()
    }
    return {"by_form": found, **times, "markdown": rows}


def _windows(quick: bool) -> Numbers:
    """Time and memory of attention in blocks and with a mask, over the length and the window."""
    from jaxlm.reproduce.attention_cost import exponent, gradient, median_seconds

    lengths, windows = ((256, 512), (128,)) if quick else (LENGTHS, WINDOWS)
    found: list[dict[str, Any]] = []
    for length in lengths:
        for window, local in ((windows[0], False), *((window, True) for window in windows)):
            call, size = gradient(length, window, local)
            seconds = median_seconds(call, 3 if quick else 7)
            found.append({"length": length, "window": window if local else None, "ms": 1e3 * seconds, "bytes": size})
    rows = ["| algorithm | " + " | ".join(f"T = {length}" for length in lengths) + " | grows as |"]
    rows.append("| --- | " + "---: | " * (len(lengths) + 1))
    powers: Numbers = {}
    for window in (None, *windows):
        name = "mask of all keys" if window is None else f"blocks, window {window}"
        points = [point for point in found if point["window"] == window]
        for unit, key in (("ms", "ms"), ("MB", "bytes")):
            values = [point[key] / (1 if key == "ms" else 1e6) for point in points]
            power = exponent(list(lengths), values)
            powers[f"power_{key}_{'mask' if window is None else window}"] = power
            rows.append(f"| {name}, {unit} | " + " | ".join(f"{v:.1f}" for v in values) + f" | T^{power:.2f} |")
    return {"points": found, **powers, "markdown": rows}


def _draw(records: dict[str, list[Numbers]]) -> "Figure | None":
    """Losses, the change of context, cost over the heads, cost over the length."""
    from matplotlib.figure import Figure

    parts = [
        (draw, needed)
        for draw, needed in (
            (_draw_losses, ("learned", "rope")),
            (_draw_context, ("rope", "rope-256")),
            (_draw_heads("step_ms", "time of a step (ms)", 1.0), ("heads",)),
            (_draw_heads("compiled_bytes", "memory of a step (MB)", 1e6), ("heads",)),
            (_draw_heads("resident_bytes", "peak resident memory (MB)", 1e6), ("heads",)),
            (_draw_heads("after_attention_bytes", "kept after the attention of a layer (MB)", 1e6), ("heads",)),
            (_draw_windows("ms", "time (ms)", 1.0), ("windows",)),
            (_draw_windows("bytes", "memory (MB)", 1e6), ("windows",)),
        )
        if all(records[name] for name in needed)
    ]
    if not parts:
        return None
    figure = Figure(figsize=(14, 4 * ((len(parts) + 1) // 2)))
    grid = figure.subplots((len(parts) + 1) // 2, 2, squeeze=False).ravel()
    for axes, (draw, _) in zip(grid, parts, strict=False):
        draw(axes, records)
    for axes in grid[len(parts) :]:
        axes.remove()
    return figure


_STYLES = {"learned positions": ("#0072B2", "o"), "RoPE": ("#D55E00", "s")}
"""Colours and markers that stay the same in all parts."""


def _draw_losses(axes: Any, records: dict[str, list[Numbers]]) -> None:
    from jaxlm.reproduce.pictures import draw_curves, mean_curve

    shown = {"learned positions": "learned", "RoPE": "rope", "RoPE, 2 key/value heads": "rope-gqa"}
    curves = {label: mean_curve(records[row]) for label, row in shown.items() if records[row]}
    draw_curves(axes, curves, colors=_STYLES)
    axes.set(title="chargpt, context 128")


def _draw_context(axes: Any, records: dict[str, list[Numbers]]) -> None:
    from jaxlm.reproduce.pictures import draw_curves, mean_curve

    curves = {}
    for label, row in (("learned positions", "learned"), ("RoPE", "rope")):
        if not records[row] or not records[f"{row}-256"]:
            continue
        (steps, losses), (more, after) = mean_curve(records[row]), mean_curve(records[f"{row}-256"])
        curves[label] = [*steps, *(steps[-1] + step for step in more)], [*losses, *after]
    draw_curves(axes, curves, top=2.2, colors=_STYLES)
    axes.axvline(600, color="#6B7280", linestyle=":")
    axes.set(title="from context 128 to 256 after 600 steps")


def _draw_heads(quantity: str, label: str, unit: float) -> Any:
    def draw(axes: Any, records: dict[str, list[Numbers]]) -> None:
        from jaxlm.reproduce.pictures import COLORS, MARKERS
        from jaxlm.run.plots import label_ends

        ends = []
        for (form, costs), color, marker in zip(records["heads"][0]["by_form"].items(), COLORS, MARKERS, strict=False):
            values = [cost[quantity] / unit for cost in costs.values()]
            axes.plot([int(heads) for heads in costs], values, color=color, marker=marker)
            ends.append((values[-1], form, color))
        axes.set(xlabel="key/value heads of 6", ylabel=label, xticks=HEADS, title="a training step, batch 16 x 128")
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        label_ends(axes, ends)

    return draw


def _draw_windows(quantity: str, label: str, unit: float) -> Any:
    def draw(axes: Any, records: dict[str, list[Numbers]]) -> None:
        from matplotlib.ticker import NullLocator

        from jaxlm.reproduce.pictures import COLORS, MARKERS

        points = records["windows"][0]["points"]
        for window, color, marker in zip((None, *WINDOWS), COLORS, MARKERS, strict=False):
            chosen = [point for point in points if point["window"] == window]
            if not chosen:
                continue
            lengths, values = [p["length"] for p in chosen], [p[quantity] / unit for p in chosen]
            axes.plot(lengths, values, color=color, marker=marker)
            name = "mask" if window is None else f"window {window}"
            axes.annotate(name, (lengths[-1], values[-1]), (6, 0), textcoords="offset points", color=color, va="center")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title="attention, forward and backward")
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.4)
        axes.grid(alpha=0.3)

    return draw


EXPERIMENT = Experiment(
    name="cmu10423",
    title="CMU 10-423: RoPE, grouped queries, sliding windows (chargpt)",
    rows=(
        Training(
            name="learned",
            label="learned positions, 600 steps",
            config=_chargpt(),
            prompts=("\n",),
            note="minGPT's weight decay leaves embeddings out, ours does not",
        ),
        Training(
            name="rope",
            label="RoPE, 600 steps",
            config=_chargpt(position="rope"),
            below=("learned", 0.0),
            prompts=("\n",),
        ),
        Training(
            name="rope-256",
            label="RoPE, 200 more at context 256",
            config=_chargpt(200, position="rope", max_seq_len=256),
            init_from="rope",
            shown=("val_loss", "start_loss"),
            note="Losses at context 256, and start_loss is that before the first step",
            prompts=("\n",),
        ),
        Training(
            name="learned-256",
            label="learned positions, 200 more at context 256",
            config=_chargpt(200, max_seq_len=256),
            init_from="learned",
            extend_positions=True,
            shown=("val_loss", "start_loss"),
            note="The new rows of the table begin at zero; start_loss is the loss at context 256 before the first step",
        ),
        Training(
            name="rope-gqa",
            label="RoPE, 2 key/value heads, 600 steps",
            config=_chargpt(position="rope", num_kv_heads=2),
        ),
        Training(
            name="rope-summed",
            label="RoPE, 2 key/value heads, summed scores, 600 steps",
            config=_chargpt(position="rope", num_kv_heads=2, kv_sharing="summed_scores"),
        ),
        Training(
            name="llama-char",
            label="llama-char, 2000 steps",
            config=preset("llama-char"),
            seeds=THREE_SEEDS,
            prompts=("\n",),
        ),
        Measurement(
            name="heads",
            label="a step over the key/value heads",
            measure=_heads,
            measured={
                "batch_size": HEADS_BATCH,
                "heads": HEADS,
                "forms": FORMS,
                "model": changed_fields(_MODEL),
            },
            note="chargpt with RoPE, without dropout, batch 16 x 128",
            shown=tuple(f"{form}_{count}_step_ms" for form in FORMS for count in (1, 6)),
        ),
        Measurement(
            name="windows",
            label="sliding windows in blocks against a mask",
            measure=_windows,
            measured={"lengths": LENGTHS, "windows": WINDOWS, "batch_size": 1, "heads": 1, "head_dim": 64},
            note="Batch 1, one head of 64, forward and backward; the power p of T^p, fitted over 512 to 8,192 tokens",
            shown=("power_ms_mask", "power_ms_128", "power_bytes_mask", "power_bytes_128"),
            targets={"power_ms_128": 1.1, "power_bytes_128": 1.1},
        ),
    ),
    side_by_side=False,
    draw=_draw,
)
