"""`jaxlm eval`: measures a run on held-out data."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.cli.options import CheckpointOptions, RunArgument, parse_options
from jaxlm.cli.output import print_json, print_table
from jaxlm.config.base import check_at_least, check_seed
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.run.folder import Run


TASK_OPTIONS: dict[str, set[str]] = {
    "loss": set(),
    "prediction": {"limit", "batch_size"},
    "generation": {"limit", "batch_size", "temperature", "top_k", "top_p", "seed", "oracle"},
    "likelihood": {"limit", "batch_size"},
}
"""The options that each task reads besides those of all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalOptions(CheckpointOptions):
    """Measure a run on held-out data."""

    run: RunArgument
    """Folder of the run."""
    task: Literal["loss", "prediction", "generation", "likelihood"] = "loss"
    """What to measure. prediction: greedily 10 characters after 30; generation: draws 30 after 40."""
    limit: int | None = None
    """Rows of a task; default: all that are held out."""
    batch_size: int = 64
    """Rows of a task computed at once."""
    temperature: float = 1.0
    """For generation: logits are divided by it."""
    top_k: int | None = None
    """For generation: keep the k likeliest tokens."""
    top_p: float | None = None
    """For generation: keep the smallest set of likeliest tokens whose probability reaches top_p."""
    seed: int = 0
    """For generation: seed of the draws."""
    oracle: Path | None = None
    """For generation: the model that judges it, another run or a Hugging Face folder."""
    path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Where the run's data lie now, if they have moved."""
    val_path: Annotated[Path | None, tyro.conf.arg(name="data.val-path")] = None
    """Likewise its held-out transcripts."""


def evaluate(arguments: list[str]) -> int:
    """`jaxlm eval RUN`: the numbers of a task as a table or JSON."""
    options = parse_options(_EvalOptions, arguments, "eval")
    path = options.run
    _check(options)
    from jaxlm.cli.compilation_cache import kept_programs

    with kept_programs():
        from jaxlm.evals import loss
        from jaxlm.run.folder import load_run

        loaded = load_run(path, options.step)
        if options.path or options.val_path:  # the data lie elsewhere; their sha256 must be that of the run
            moved = loaded.config.with_data_at(options.path, options.val_path)
            loaded = dataclasses.replace(loaded, config=moved)
        found: dict[str, Any] = loss.evaluate(loaded) if options.task == "loss" else _task(loaded, options)
    if options.json:
        print_json({"run": str(path), **found})
        return 0
    examples = found.pop("examples", [])
    shown = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in found.items()}
    given = [[name, text] for name, text in shown.items() if found[name] is not None]
    print_table(f"{path}", ["quantity", "value"], given)
    if examples:
        print_table("examples", list(examples[0]), [list(example.values()) for example in examples])
    return 0


def _task(loaded: "Run", options: _EvalOptions) -> dict[str, Any]:
    """What a task finds, after the settings it was asked for."""
    from jaxlm.evals import tasks

    functions: dict[str, Callable[..., dict[str, Any]]] = {
        "prediction": tasks.prediction,
        "generation": tasks.generation,
        "likelihood": tasks.likelihood,
    }
    chosen = {name: getattr(options, name) for name in TASK_OPTIONS[options.task]}
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(chosen.items())
        if name not in ("limit", "batch_size")
    }
    found = functions[options.task](loaded, **chosen)
    return {"step": loaded.step, "task": options.task, **settings, **found}


def _check(options: _EvalOptions) -> None:
    check_at_least(options, 1, "limit", "batch_size")
    check_seed(options)
    every = set().union(*TASK_OPTIONS.values())
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in every - TASK_OPTIONS[options.task] and value != field.default:
            readers = [task for task, names in TASK_OPTIONS.items() if field.name in names]
            raise UserError(
                f"--{field.name.replace('_', '-')} {value} is not for --task {options.task}: "
                f"leave it out, or use --task {' or '.join(readers)}"
            )
