"""`jaxlm train`: trains a model from new weights or from those of a run, or continues a run."""

import contextlib
import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxlm.cli.options import Given, parse_options, with_kinds
from jaxlm.cli.output import say
from jaxlm.cli.streams import drop_output
from jaxlm.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    presets,
)
from jaxlm.config.train import Log
from jaxlm.errors import ContextWarning, UserError
from jaxlm.terminal import for_stdout

if TYPE_CHECKING:
    from jaxlm.run.folder import Run

RUNS = Path("runs")
"""Where runs without --out go."""


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
    mesh: MeshConfig
    out: Path | None = None
    """New run folder; default: the next free runs/PRESET-n."""
    resume: bool = False
    """Continue the run in --out from its latest checkpoint."""
    init_from: Path | None = None
    """Begin with the weights, the vocabulary and the model settings of this run, or of this Hugging Face folder.
    Without a PRESET the run's other settings are the defaults too."""
    log: tuple[Log, ...] = ()
    """Where the rows of metrics.jsonl go, too: tensorboard (out/tensorboard), wandb (Weights & Biases)."""
    extend_positions: Annotated[bool, tyro.conf.arg(name="model.extend-positions")] = False
    """With --init-from: a longer --model.max-seq-len may add places to a learned position table. They begin at zero."""
    keep_schedule: Annotated[bool, tyro.conf.arg(name="optim.keep-schedule")] = False
    """With --resume and more --train.steps: the learning rate goes on as if the run ended where it would have."""


def train(arguments: list[str]) -> int:
    """`jaxlm train [PRESET]`: trains, then prints a sample."""
    own_warmup, source = False, None

    def defaults(given: Given) -> _TrainOptions:
        nonlocal own_warmup, source
        own_warmup = "warmup_steps" in given.get("optim", {})
        source = _source(given.get("init_from"))
        return _defaults(given, source)

    options = parse_options(_TrainOptions, arguments, "train", defaults)
    parts = {name: getattr(options, name) for name in _PARTS}
    config = ExperimentConfig(preset=options.preset, **parts)
    config = config.with_data_at(config.data.path, config.data.val_path)

    from jaxlm.compilation_cache import kept_programs
    from jaxlm.run.printing import outlived
    from jaxlm.run.training import train as train_run
    from jaxlm.sharding import processes

    if config.mesh.coordinator is not None:  # no result goes to stdout then, only what Gloo says of its connections
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with outlived(stdout=True), kept_programs(), processes.joined(config.mesh):
        place = _next_free(config.preset) if options.out is None else contextlib.nullcontext(options.out)
        with place as folder:
            outcome = train_run(
                config,
                folder,
                options.resume,
                own_warmup,
                keep_schedule=options.keep_schedule,
                init_from=source,
                extend_positions=options.extend_positions,
                log=options.log,
            )
        if outcome.signum is not None:
            return 128 + outcome.signum
        if not processes.first():
            return 0
        try:
            if processes.count() == 1:
                print(for_stdout(_sample(folder)), flush=True)  # it is kept in the folder, whatever becomes of stdout
        except BrokenPipeError:
            drop_output()  # nobody reads it any more, and the run is whole all the same
        finally:
            about = "" if config.train.eval_batches is None else "about "
            loss = "" if outcome.val_loss is None else f", val_loss {about}{outcome.val_loss:.4f}"
            say(f"\nrun: {folder} (step {outcome.step}{loss}; curve in loss.png)")
            say(f"more: jaxlm sample {folder} --num-samples 3 --seed 1")
    return 0


def _source(path: Path | None) -> "Path | Run | None":
    """What --init-from names. A Hugging Face folder is read at once: its weights are part of what decides the model."""
    if path is None:
        return None
    from jaxlm.run.foreign_model import is_hugging_face, read_model

    return read_model("hf", path) if is_hugging_face(path) else path


def _defaults(given: Given, source: "Path | Run | None" = None) -> _TrainOptions:
    """The options of the preset, of the run to continue, or of the model whose weights are taken."""
    name, out = given.get("preset"), given.get("out")
    if name is not None and name not in presets.PRESETS and Path(name).exists():  # a shell makes many words of *.txt
        raise UserError(f"preset {name!r} is a file: give --data.path before each of several, or a pattern in quotes")
    if given.get("resume"):
        from jaxlm.run.folder import read_config

        if out is None:
            raise UserError("--resume needs the run to continue: give --out DIR")
        base = read_config(out)
        if name not in (None, base.preset):
            raise UserError(f"{out} was trained with preset {base.preset!r}, not {name!r}: drop the preset")
    elif source is not None:
        from jaxlm.run.init_from import default_config

        base = default_config(source, name)
    else:
        base = presets.preset(name or "nanogpt-cpu")
    base = _with_length(with_kinds(base, given), given["train"])
    return _TrainOptions(preset=base.preset, **{part: getattr(base, part) for part in _PARTS})


def _with_length(base: ExperimentConfig, given: Given) -> ExperimentConfig:
    """The config without epochs of its own if steps are given.

    Raises:
      UserError: both are given.
    """
    if "steps" not in given:
        return base
    if given.get("epochs") is not None:
        raise UserError(
            f"--train.steps {given['steps']} and --train.epochs {given['epochs']} both say how long the run is: leave "
            "one out"
        )
    return dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=None))


@contextlib.contextmanager
def _next_free(preset: str) -> Iterator[Path]:
    """Yields the next free runs/PRESET-n, created empty, so that no other training takes the same name.

    Of several processes, process 0 chooses and creates it.

    Raises:
      UserError: it cannot be created.
    """
    from jaxlm.sharding import processes

    number = int(processes.agree(_create_next(preset) if processes.first() else 0)[0, 0])
    folder = RUNS / f"{preset}-{number}"
    try:
        yield folder
    finally:
        if processes.first():
            with contextlib.suppress(OSError):  # it is not empty, so something was trained
                folder.rmdir()


def _create_next(preset: str) -> int:
    """Creates the next free runs/PRESET-n, and returns n."""
    for number in itertools.count(1):
        folder = RUNS / f"{preset}-{number}"
        try:
            folder.mkdir(parents=True)
            return number
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be created ({error.strerror}): choose another --out") from None
    raise AssertionError("the numbers never end")


def _sample(out: Path) -> str:
    """Text from a run that has just been trained, also kept in its folder."""
    from jaxlm.data.files import staged
    from jaxlm.run.folder import load_run
    from jaxlm.run.samples import sample

    run = load_run(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)  # long samples are expected here
        text = "\n---\n".join(sample(run, run.config.sample))
    with staged(out / "samples" / f"step-{run.step}.txt", "free some space") as path:
        path.write_text(text, encoding="utf-8")
    return text
