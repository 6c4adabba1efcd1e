"""`jaxlm train`: trains a model, or continues a run."""

import contextlib
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator
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
from jaxlm.errors import UserError

RUNS = Path("runs")
"""Where runs without --out go."""


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
    """New run folder; default: the next free runs/PRESET-n."""
    resume: bool = False
    """Continue the run in --out from its latest checkpoint."""


def train(arguments: list[str]) -> int:
    """`jaxlm train [PRESET]`: trains, then prints a sample."""
    first, rest = first_word(arguments)
    base = presets.preset(first or "nanogpt-cpu")
    if "--resume" in rest and not asks_help(rest):  # the options change the run's own configuration
        from jaxlm.run.folder import read_config

        out = parse_options(_OutOption, rest, "train [PRESET]", _OutOption(), others=True).out
        if out is None:
            raise UserError("--resume needs the run to continue: give --out DIR")
        stored = read_config(out)
        if first and first != stored.preset:
            raise UserError(f"{out} was trained with preset {stored.preset!r}, not {first!r}: drop the preset")
        base = stored
    base = of_kinds(base, rest, "train [PRESET]")
    options = parse_options(_TrainOptions, rest, "train [PRESET]", _train_defaults(base))
    parts = {name: getattr(options, name) for name in _PARTS}
    config = ExperimentConfig(preset=base.preset, **parts)
    config = config.with_data_at(config.data.path, config.data.val_path)

    from jaxlm.run.training import train as train_run

    with _next_free(config.preset) if options.out is None else contextlib.nullcontext(options.out) as folder:
        outcome = train_run(config, folder, options.resume)
    if outcome.signum is not None:
        return 128 + outcome.signum
    print(_sample(folder))
    loss = "" if outcome.val_loss is None else f", val_loss {outcome.val_loss:.4f}"
    print(f"\nrun: {folder} (step {outcome.step}{loss}; curve in loss.png)", file=sys.stderr)
    print(f"more: jaxlm sample {folder} --num-samples 3 --seed 1", file=sys.stderr)
    return 0


def _train_defaults(config: ExperimentConfig) -> _TrainOptions:
    return _TrainOptions(**{name: getattr(config, name) for name in _PARTS})


@contextlib.contextmanager
def _next_free(preset: str) -> Iterator[Path]:
    """Yields the next free runs/PRESET-n, created empty, so that no other training takes the same name.

    Raises:
      UserError: it cannot be created.
    """
    for number in itertools.count(1):
        folder = RUNS / f"{preset}-{number}"
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be created ({error.strerror}): choose another --out") from None
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):  # nothing was trained
            folder.rmdir()


def _sample(out: Path) -> str:
    """Text from a run that has just been trained, also kept in its folder."""
    from jaxlm.data.files import staged
    from jaxlm.run.folder import load_run
    from jaxlm.run.samples import sample

    run = load_run(out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt .* pass the learned position table")  # long samples are expected here
        text = "\n---\n".join(sample(run, run.config.sample))
    with staged(out / "samples" / f"step-{run.step}.txt", "free some space") as path:
        path.write_text(text, encoding="utf-8")
    return text
