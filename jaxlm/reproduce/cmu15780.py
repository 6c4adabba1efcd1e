"""CMU 15-780: Adam against SGD over one epoch, and cached against naive sampling over the length."""

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.config.presets import preset
from jaxlm.reproduce.rows import Experiment, Measurement, Numbers, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (32, 64, 128, 256, 512)
TEMPERATURE = 0.6
TRAINING_TOKENS = 1_003_854
"""Characters of the training split of tinyshakespeare."""


def _epoch(name: str, label: str, optimizer: str, rate: float, **fields: Any) -> Training:
    """One epoch at a constant rate: no warm-up, decay or clipping."""
    base = preset("nanogpt-cpu")
    optim = OptimConfig(
        name=optimizer,
        learning_rate=rate,
        b2=0.999 if optimizer == "adam" else 0.99,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=None,
    )
    steps = TRAINING_TOKENS // (base.train.batch_size * base.model.max_seq_len)
    train = dataclasses.replace(base.train, steps=steps, eval_every=100, keep=1)
    return Training(
        name=name,
        label=label,
        config=dataclasses.replace(base, optim=optim, train=train),
        seeds=(0, 1, 2),
        note="The model is nanogpt-cpu: tied head, no biases",
        **fields,
    )


def _sampling(quick: bool) -> Numbers:
    """Seconds of both samplers for the same tokens, from a prompt of one token; median of three, in turn."""
    from jaxlm.decode.generate import generate
    from jaxlm.decode.uncached import generate_naive
    from jaxlm.model.build import build_model, init_params

    lengths = (8, 16) if quick else LENGTHS
    cfg: ModelConfig = dataclasses.replace(preset("nanogpt-cpu").model, max_seq_len=max(LENGTHS) + 1)
    model = build_model(cfg)
    params = init_params(model, jax.random.key(0))
    prompt = np.zeros((1, 1), np.int32)
    rows = ["| tokens | naive, s | cached, s | naive / cached | same tokens |", "| ---: | ---: | ---: | ---: | ---: |"]
    points = []
    for length in lengths:
        times: dict[Any, list[float]] = {generate_naive: [], generate: []}
        tokens = {}
        for round_ in range(4):
            for sampler, taken in times.items():
                started = time.perf_counter()
                out = sampler(
                    model, params, prompt, max_new_tokens=length, key=jax.random.key(1), temperature=TEMPERATURE
                )
                tokens[sampler] = np.asarray(out.tokens)
                if round_:  # the first one compiles
                    taken.append(time.perf_counter() - started)
        naive, cached = (statistics.median(taken) for taken in times.values())
        same = int((tokens[generate] == tokens[generate_naive]).sum())
        points.append({"tokens": length, "naive_s": naive, "cached_s": cached, "same": same})
        rows.append(f"| {length} | {naive:.3f} | {cached:.4f} | {naive / cached:.0f} | {same} of {length} |")
    different = sum(point["tokens"] - point["same"] for point in points)
    ratio = points[-1]["naive_s"] / points[-1]["cached_s"]
    return {"points": points, "different_tokens": different, "speedup_at_longest": ratio, "markdown": rows}


def _draw(records: dict[str, list[Numbers]]) -> "Figure | None":
    from matplotlib.figure import Figure

    from jaxlm.reproduce.pictures import COLORS, MARKERS, draw_curves, mean_curve
    from jaxlm.run.plots import label_ends

    trained = {row.label: records[row.name] for row in EPOCHS if records[row.name]}
    if not trained or not records["sampling"]:
        return None
    figure = Figure(figsize=(13, 4.5))
    losses, times = figure.subplots(1, 2)
    draw_curves(losses, {label: mean_curve(done) for label, done in trained.items()}, top=3.5)
    losses.set(title="one epoch, constant rate")
    points = records["sampling"][0]["points"]
    ends = []
    for name, color, marker in zip(("naive", "cached"), COLORS, MARKERS, strict=False):
        seconds = [point[f"{name}_s"] for point in points]
        times.plot([point["tokens"] for point in points], seconds, color=color, marker=marker)
        ends.append((seconds[-1], name, color))
    times.set(xlabel="tokens generated", ylabel="seconds", title="the same tokens, temperature 0.6")
    times.grid(alpha=0.3)
    label_ends(times, ends)
    return figure


EPOCHS = (
    _epoch("adam-1e-3", "Adam 1e-3", "adam", 1e-3, below=("sgd-0.1", 0.0), prompts=("\n",)),
    _epoch("sgd-1e-3", "SGD 1e-3", "sgd", 1e-3, prompts=("\n",)),
    _epoch("sgd-0.1", "SGD 0.1", "sgd", 0.1),
)

EXPERIMENT = Experiment(
    name="cmu15780",
    title="CMU 15-780: Adam against SGD, cached against naive sampling (nanogpt-cpu)",
    rows=(
        *EPOCHS,
        Measurement(
            name="sampling",
            label="cached against naive sampling",
            measure=_sampling,
            measured={"model": "nanogpt-cpu, context 513", "tokens": LENGTHS, "temperature": TEMPERATURE},
            note="Untrained weights, a prompt of one token",
            targets={"different_tokens": 0},
            shown=("speedup_at_longest",),
        ),
    ),
    side_by_side=True,
    draw=_draw,
)
