"""nanoGPT's GPU configuration: shakespeare-char, 5000 steps. It needs an accelerator."""

from typing import TYPE_CHECKING

from jaxlm.config.presets import preset
from jaxlm.reproduce.rows import Experiment, Numbers, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _draw(records: dict[str, list[Numbers]]) -> "Figure | None":
    from matplotlib.figure import Figure

    from jaxlm.reproduce.pictures import draw_curves, mean_curve

    done = records["shakespeare-char"]
    if not done:
        return None
    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot()
    curves = {name: mean_curve(done, split) for name, split in (("validation", "val"), ("training", "train"))}
    draw_curves(axes, curves, {"validation": 1.4697})
    return figure


EXPERIMENT = Experiment(
    name="nanogpt-gpu",
    title="nanoGPT's GPU configuration (shakespeare-char, 5000 steps)",
    rows=(
        Training(
            name="shakespeare-char",
            label="shakespeare-char",
            config=preset("shakespeare-char"),
            published={"best_val_loss": 1.4697},
            targets={"best_val_loss": 1.4697},
            prompts=("\n",),
            accelerator=True,
            note="The published run took about 3 minutes on one A100; its loss is the best on random batches",
        ),
    ),
    side_by_side=False,
    draw=_draw,
)
