"""`jaxlm runs`: the runs in a folder, side by side. Reads configurations and logs only, so it imports no JAX."""

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.cli.options import JsonOption, parse_options
from jaxlm.cli.output import print_json, print_table
from jaxlm.cli.presets import sizes
from jaxlm.config import ExperimentConfig
from jaxlm.config.base import difference, from_dict
from jaxlm.config.presets import PRESETS, preset
from jaxlm.data.files import read_sealed
from jaxlm.data.reading import read_json
from jaxlm.errors import UserError
from jaxlm.run.manifest import Loss
from jaxlm.run.metrics import read_rows
from jaxlm.terminal import one_line, printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RunsOptions(JsonOption):
    """List the runs in a folder with their steps, their best validation losses and the settings that differ."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[FOLDER]")] = Path("runs")
    """Folder of runs, or one run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run's files say about it."""

    run: str
    preset: str
    step: int
    """The last step that was logged or saved."""
    steps: int
    """The steps of the whole run."""
    val_loss: float | None
    """The lowest validation loss (nats per token); None if it was never measured."""
    val_step: int | None
    """Where it was measured."""
    checkpoints: list[int]
    age_s: float
    """Seconds since the run was last written to."""
    settings: dict[str, Any]
    """The fields in which its config differs from its preset, by dotted name; the sizes of a model without a preset."""


def runs(arguments: list[str]) -> int:
    """`jaxlm runs [FOLDER]`: a table or JSON; folders that are not sound runs are named on stderr."""
    options = parse_options(_RunsOptions, arguments, "runs")
    folder = options.folder
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that holds runs, or make a run by jaxlm train")
    paths = [folder] if (folder / "config.json").exists() else _subfolders(folder)
    summaries = []
    for path in paths:
        try:
            summaries.append(_summary(path))
        except (UserError, OSError) as error:
            if paths == [folder] and isinstance(error, UserError):
                raise
            print(f"jaxlm: warning: {one_line(str(error))}", file=sys.stderr)
    if options.json:
        print_json({"runs": [dataclasses.asdict(summary) for summary in summaries]})
    elif summaries:
        _print_summaries(str(folder), summaries)
    else:
        print(f"{printable(str(folder))} holds no runs")
    return 0


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, tiny-2 before tiny-10, without hidden ones."""
    paths = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    parts = {path: re.split("([0-9]+)", path.name) for path in paths}  # every second one is a number
    return sorted(paths, key=lambda path: [int(part) if i % 2 else part for i, part in enumerate(parts[path])])


def _summary(path: Path) -> RunSummary:
    """Reads a run's files.

    Raises:
      UserError: they are damaged, or not those of a run.
    """
    config = _read_config(path / "config.json")
    rows = read_rows(path / "metrics.jsonl")
    losses = {row["step"]: _loss(row) for row in rows if row.get("val_loss") is not None}
    checkpoints = {}
    for file in (path / "checkpoints").glob("*/manifest.json"):
        if re.fullmatch("0|[1-9][0-9]{0,17}", file.parent.name):
            content = _read_object(file)
            has_loss = isinstance(content.get("val_loss"), float | int)
            checkpoints[int(file.parent.name)] = _loss(content) if has_loss else None
    losses |= {step: loss for step, loss in checkpoints.items() if loss is not None}
    best = min(losses, key=lambda step: losses[step].rank, default=None)
    newest = max(file.stat().st_mtime for file in (path, *path.glob("*.json*")))
    if config.preset in PRESETS:
        settings = {name: ours for name, ours, _ in difference(config, preset(config.preset))}
    else:
        settings = {"model": sizes(config.model)}
    return RunSummary(
        run=path.name,
        preset=config.preset,
        step=max((*(row["step"] for row in rows), *checkpoints), default=0),
        steps=config.train.steps,
        val_loss=None if best is None else losses[best].val_loss,
        val_step=best,
        checkpoints=sorted(checkpoints),
        age_s=round(max(time.time() - newest, 0.0), 1),
        settings=settings,
    )


def _loss(content: dict[str, Any]) -> Loss:
    """The loss in a row or a manifest."""
    batches = content.get("eval_batches")
    return Loss(content["val_loss"], batches if isinstance(batches, int) else None)


def _read_config(file: Path) -> ExperimentConfig:
    if not file.is_file():
        raise UserError(f"{file.parent} is not a run: it has no config.json")
    content = read_sealed(file, "put the old one back")
    try:
        return from_dict(ExperimentConfig, content["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a configuration of this version: {error}") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it does not hold a JSON object")
    return content


def _print_summaries(title: str, summaries: list[RunSummary]) -> None:
    """The table; settings that all runs share stand once below it."""
    shared = _shared([summary.settings for summary in summaries]) if len(summaries) > 1 else {}
    rows = []
    for summary in summaries:
        loss = "" if summary.val_loss is None else f"{summary.val_loss:.4f} at {summary.val_step}"
        settings = {name: value for name, value in summary.settings.items() if name not in shared}
        step = f"{summary.step}/{summary.steps}"
        rows.append([summary.run, summary.preset, step, loss, _age(summary.age_s), _settings_text(settings)])
    print_table(title, ["run", "preset", "step", "val loss", "age", "settings"], rows)
    if shared:
        print(f"all of them: {printable(_settings_text(shared, ', '))}")


def _shared(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that are the same in all."""
    first, *others = settings
    return {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}


def _settings_text(settings: dict[str, Any], separator: str = "\n") -> str:
    return separator.join(f"{name} {value}" for name, value in settings.items())


def _age(seconds: float) -> str:
    """A time in its largest unit, such as "3 h"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
