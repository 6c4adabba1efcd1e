"""`jaxlm eval`: measures a run on held-out data."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.cli.options import CheckpointOptions, parse_options, print_json, print_table, run_word
from jaxlm.config import SamplingParams
from jaxlm.config.base import check_at_least, to_dict
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.run.folder import Run


TASK_OPTIONS: dict[str, set[str]] = {
    "loss": set(),
    "prediction": {"limit", "batch_size"},
    "generation": {"limit", "batch_size", "oracle", *(field.name for field in dataclasses.fields(SamplingParams))},
    "likelihood": {"limit", "batch_size"},
}
"""The options that each task reads besides those of all."""


GENERATION_SAMPLING = SamplingParams(max_new_tokens=30)
"""The options of sampling of the generation task, unless others are given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalOptions(CheckpointOptions):
    task: Literal["loss", "prediction", "generation", "likelihood"] = "loss"
    """What to measure. prediction: 10 greedy characters after 30; generation: 30 sampled characters after 40."""
    limit: int | None = None
    """Rows of a task; default: all that are held out."""
    batch_size: int = 64
    """Rows of a task computed at once."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = GENERATION_SAMPLING
    oracle: Path | None = None
    """For generation, as are the options of sampling: the model that scores it, another run or a Hugging Face
    folder."""
    path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Where the run's data lie now, if they have moved."""
    val_path: Annotated[Path | None, tyro.conf.arg(name="data.val-path")] = None
    """Likewise its held-out transcripts."""


def evaluate(arguments: list[str]) -> int:
    """`jaxlm eval RUN`: the numbers of a task as a table or JSON."""
    path, rest = run_word(arguments, "eval")
    options = parse_options(_EvalOptions, rest, "eval RUN", _EvalOptions())
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
    """The result of a task, after the options it was given."""
    from jaxlm.evals import tasks

    rows = options.limit, options.batch_size
    settings: dict[str, Any] = {}
    if options.task == "generation":
        oracle = options.oracle
        settings = {**to_dict(options.sampling), "oracle": None if oracle is None else str(oracle)}
        results = tasks.generation(loaded, options.sampling, *rows, oracle=oracle)
    else:
        results = {"prediction": tasks.prediction, "likelihood": tasks.likelihood}[options.task](loaded, *rows)
    return {"step": loaded.step, "task": options.task, **settings, **results}


def _check(options: _EvalOptions) -> None:
    check_at_least(options, 1, "limit", "batch_size")
    idle = set().union(*TASK_OPTIONS.values()) - TASK_OPTIONS[options.task]
    defaults = {field.name: field.default for field in dataclasses.fields(options)} | vars(GENERATION_SAMPLING)
    for name, value in (vars(options) | vars(options.sampling)).items():
        if name in idle and value != defaults[name]:
            readers = [task for task, names in TASK_OPTIONS.items() if name in names]
            raise UserError(
                f"--{name.replace('_', '-')} {value} is not for --task {options.task}: "
                f"leave it out, or use --task {' or '.join(readers)}"
            )
