"""`jaxlm train`: trains a model, or goes on with a run."""

import dataclasses
import itertools
import sys
import warnings
from pathlib import Path

from jaxlm.cli.options import (
    asks_help,
    first_word,
    of_kinds,
    parse_options,
)
from jaxlm.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    presets,
)
from jaxlm.errors import PositionTableWarning, UserError

RUNS = Path("runs")


_PARTS = tuple(field.name for field in dataclasses.fields(ExperimentConfig) if field.name != "preset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OutOption:
    out: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainOptions:
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
    first, rest = first_word(arguments)
    base = presets.preset(first or "nanogpt-cpu")
    if "--resume" in rest and not asks_help(rest):  # the run's own configuration is what the options change
        from jaxlm.run.folder import read_config

        out = parse_options(_OutOption, rest, "train [PRESET]", _OutOption(), others=True).out
        if out is None:
            raise UserError("--resume needs the run to go on with: give --out DIR")
        stored = read_config(out)
        if first and first != stored.preset:
            raise UserError(f"{out} was made with preset {stored.preset!r}, not {first!r}: drop the preset")
        base = stored
    base = of_kinds(base, rest, "train [PRESET]")
    options = parse_options(_TrainOptions, rest, "train [PRESET]", _train_defaults(base))
    parts = {name: getattr(options, name) for name in _PARTS}
    config = ExperimentConfig(preset=base.preset, **parts)
    config = config.with_data_at(config.data.path, config.data.val_path)
    out = options.out or next(p for n in itertools.count(1) if not (p := RUNS / f"{base.preset}-{n}").exists())

    from jaxlm.run.samples import sample
    from jaxlm.run.training import train

    outcome = train(config, out, options.resume)
    if outcome.signum is not None:
        return 128 + outcome.signum
    from jaxlm.run.folder import load_run

    trained = load_run(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PositionTableWarning)  # long samples are expected here
        text = "\n---\n".join(sample(trained, trained.config.sample))
    (out / "samples").mkdir(exist_ok=True)
    (out / "samples" / f"step-{trained.step}.txt").write_text(text, encoding="utf-8")
    print(text)
    loss = "" if outcome.val_loss is None else f", val_loss {outcome.val_loss:.4f}"
    print(f"\nrun: {out} (step {outcome.step}{loss}; curve in loss.png)", file=sys.stderr)
    print(f"more: jaxlm sample {out} --num-samples 3 --seed 1", file=sys.stderr)
    return 0


def _train_defaults(config: ExperimentConfig) -> _TrainOptions:
    return _TrainOptions(**{name: getattr(config, name) for name in _PARTS})
