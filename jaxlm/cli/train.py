"""`jaxlm train`: trains a model, or goes on with a run."""

import dataclasses
import itertools
import sys
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from jaxlm.cli.options import Given, parse_options, with_kinds
from jaxlm.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    presets,
)
from jaxlm.errors import UserError

RUNS = Path("runs")


_PARTS = tuple(field.name for field in dataclasses.fields(ExperimentConfig) if field.name != "preset")
_PRESET = tyro.conf.arg(
    metavar="[PRESET]", help=f"Configuration that the options change, one of {', '.join(presets.PRESETS)}."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainOptions:
    """Train a model, then print a sample. The run is a folder that `jaxlm sample` and the other commands open."""

    preset: Annotated[tyro.conf.Positional[str], _PRESET] = "nanogpt-cpu"
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    sample: SampleConfig
    out: Path | None = None
    """Run folder to make; default: the next free runs/PRESET-n."""
    resume: bool = False
    """Go on with the run in --out from its latest checkpoint."""


def train(arguments: list[str]) -> int:
    """`jaxlm train [PRESET]`: trains, then prints a sample."""
    options = parse_options(_TrainOptions, arguments, "train", _defaults)
    parts = {name: getattr(options, name) for name in _PARTS}
    config = ExperimentConfig(preset=options.preset, **parts)
    config = config.with_data_at(config.data.path, config.data.val_path)
    out = options.out or next(p for n in itertools.count(1) if not (p := RUNS / f"{options.preset}-{n}").exists())

    from jaxlm.run.samples import sample
    from jaxlm.run.training import train

    outcome = train(config, out, options.resume)
    if outcome.signum is not None:
        return 128 + outcome.signum
    from jaxlm.run.folder import load_run

    trained = load_run(out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt .* pass the learned position table")  # long samples are expected here
        text = "\n---\n".join(sample(trained, trained.config.sample))
    (out / "samples").mkdir(exist_ok=True)
    (out / "samples" / f"step-{trained.step}.txt").write_text(text, encoding="utf-8")
    print(text)
    loss = "" if outcome.val_loss is None else f", val_loss {outcome.val_loss:.4f}"
    print(f"\nrun: {out} (step {outcome.step}{loss}; curve in loss.png)", file=sys.stderr)
    print(f"more: jaxlm sample {out} --num-samples 3 --seed 1", file=sys.stderr)
    return 0


def _defaults(given: Given) -> _TrainOptions:
    """The options of the preset, or of the run that is to go on."""
    name, out = given.get("preset"), given.get("out")
    if given.get("resume"):
        from jaxlm.run.folder import read_config

        if out is None:
            raise UserError("--resume needs the run to go on with: give --out DIR")
        base = read_config(out)
        if name not in (None, base.preset):
            raise UserError(f"{out} was made with preset {base.preset!r}, not {name!r}: drop the preset")
    else:
        base = presets.preset(name or "nanogpt-cpu")
    base = with_kinds(base, given)
    return _TrainOptions(preset=base.preset, **{part: getattr(base, part) for part in _PARTS})
