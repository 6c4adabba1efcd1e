"""Stanford STATS 305: from a bigram to a transformer of six blocks, at constant rates."""

import dataclasses
from typing import TYPE_CHECKING

from jaxlm.config.presets import preset
from jaxlm.reproduce.rows import THREE_SEEDS, Experiment, Numbers, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PUBLISHED = {
    "bigram": (2.4728, 2.5016, 2.50),
    "embedding-bigram": (2.4584, 2.4927, 2.49),
    "single-head": (2.3517, 2.3903, 2.39),
    "multi-head": (1.9331, 2.0736, 2.07),
    "relu-transformer": (1.4201, 1.6275, 1.63),
}
"""Preset -> published training and validation loss, and the validation loss to reach."""

_SLOW = {"multi-head", "relu-transformer"}


def _row(name: str) -> Training:
    train_loss, val_loss, target = _PUBLISHED[name]
    config = preset(name)
    train = dataclasses.replace(config.train, eval_every=200 if name == "relu-transformer" else 100, keep=1)
    if name == "relu-transformer":
        train = dataclasses.replace(train, checkpoint_every=50)
    return Training(
        name=name,
        label=config.preset,
        config=dataclasses.replace(config, train=train),
        published={"val_loss": val_loss, "train_loss": train_loss},
        targets={"val_loss": target},
        seeds=(0,) if name in _SLOW else THREE_SEEDS,
        prompts=("\n", "ROMEO:"),
        note="The published losses are those after step 1800" if name == "relu-transformer" else "",
    )


def _draw(records: dict[str, list[Numbers]]) -> "Figure | None":
    """Training and validation loss of each model against the step."""
    from matplotlib.figure import Figure

    from jaxlm.reproduce.pictures import draw_curves, mean_curve

    done = [name for name in _PUBLISHED if records[name]]
    if not done:
        return None
    figure = Figure(figsize=(12, 5))
    training, validation = figure.subplots(1, 2)
    for axes, split, column in ((training, "train", 0), (validation, "val", 1)):
        published = {name: _PUBLISHED[name][column] for name in done}
        draw_curves(axes, {name: mean_curve(records[name], split) for name in done}, published, top=3.3)
    training.set(title="training split", ylabel="loss (nats per token)")
    validation.set(title="validation split", ylabel="")
    return figure


EXPERIMENT = Experiment(
    name="stats305",
    title="Stanford STATS 305: from a bigram to six blocks",
    rows=tuple(map(_row, _PUBLISHED)),
    side_by_side=False,
    draw=_draw,
)
