"""`jaxlm eval`: measures runs on held-out data or on another text."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.cli.options import CheckpointOptions, MeshOption, parse_options
from jaxlm.cli.output import print_json, print_table, say
from jaxlm.config import SamplingParams
from jaxlm.config.base import check_at_least, to_dict
from jaxlm.config.data import Paths, as_paths
from jaxlm.config.sampling import SpecialTokens
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.run.folder import Run


TASK_OPTIONS: dict[str, set[str]] = {
    "loss": set(),
    "prediction": {"limit", "batch_size", "prompts", "save", "temperature", "fit_temperature"},
    "generation": {
        *("limit", "batch_size", "prompts", "save", "beam_width", "oracle"),
        *(field.name for field in dataclasses.fields(SamplingParams)),
    },
    "likelihood": {"limit", "batch_size"},
}
"""The options that each task reads besides those that all read."""


GENERATION_SAMPLING = SamplingParams(max_new_tokens=30)
"""The options of sampling of the generation task, unless others are given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalOptions(MeshOption, CheckpointOptions):
    """Measure runs on held-out data or on another text."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Folders of the runs; several are compared in one table."""
    task: Literal["loss", "prediction", "generation", "likelihood"] = "loss"
    """What to measure. loss: over every target; prediction: 10 characters after 30, greedily; generation: samples 30
    characters after 40; likelihood: of whole rows."""
    limit: int | None = None
    """Rows of a task; default: all that are held out."""
    batch_size: int = 64
    """Rows of a task computed at once."""
    prompts: Path | None = None
    """For prediction and generation: an .npz file with prompts, in place of held-out data. inp [rows, ids], tgt (the
    ids that follow, if known), vocabulary (the symbol of each id; without it ids are the run's own)."""
    save: Path | None = None
    """For prediction and generation: a new .npz file for ids, texts, and the logits of prediction."""
    fit_temperature: bool = False
    """For prediction: divide the logits by the temperature that is best on rows of the training split, and report the
    likelihood after that as well."""
    beam_width: int | None = None
    """For generation: the best of a beam search with so many beams, in place of samples."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = GENERATION_SAMPLING
    oracle: Path | None = None
    """For generation, as are the options of sampling (prediction reads --temperature): the model that scores it,
    another run or a Hugging Face folder."""
    path: Annotated[Paths, tyro.conf.arg(name="data.path")] = None
    """Another text to evaluate with the run's tokenizer (in all forms that jaxlm train takes), or the run's own data if
    they have moved."""
    val_path: Annotated[Paths, tyro.conf.arg(name="data.val-path")] = None
    """The run's own held-out data, if they have moved."""
    special_tokens: Annotated[SpecialTokens | None, tyro.conf.arg(name="data.special-tokens")] = None
    """What <|endoftext|> and the like in the text become: id, their one token each; text, the tokens of their
    characters; None = as the run read its own data, text for one that was imported."""


def evaluate(arguments: list[str]) -> int:
    """`jaxlm eval RUN...`: the results of a task as a table or JSON."""
    options = parse_options(_EvalOptions, arguments, "eval")
    if not options.runs:
        raise UserError("RUN is missing; see jaxlm eval --help")
    _check(options)
    from jaxlm.compilation_cache import kept_programs
    from jaxlm.data.texts import with_stdin_kept

    path, val_path = with_stdin_kept(options.path), with_stdin_kept(options.val_path)
    options = dataclasses.replace(options, path=path, val_path=val_path)  # stdin is read once for all runs

    with kept_programs(), options.in_context():
        results = [{"run": str(path), **_of_run(path, options)} for path in options.runs]
    if options.json:
        print_json(results[0] if len(results) == 1 else {"runs": results})
    elif len(results) > 1:
        _print_comparison(results)
    else:
        _print_result(results[0])
    return 0


def _report(done: int, total: int) -> None:
    if done < total:  # the result says the rest
        say(f"evaluated {done:,} of {total:,} tokens")


def _of_run(path: Path, options: _EvalOptions) -> dict[str, Any]:
    """What `_evaluate` returns; of several runs, a refusal names the one that it is about."""
    try:
        return _evaluate(path, options)
    except UserError as error:
        named = len(options.runs) == 1 or str(path) in str(error)
        raise UserError(str(error) if named else f"{path}: {error}") from None


def _evaluate(path: Path, options: _EvalOptions) -> dict[str, Any]:
    from jaxlm.evals import loss
    from jaxlm.run.folder import load_run

    run = load_run(path, options.step)
    if options.special_tokens is not None:
        data = dataclasses.replace(run.config.data, special_tokens=options.special_tokens)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    if options.task == "loss":
        report = _report if sys.stderr.isatty() else None
        return loss.evaluate(run, options.path, options.val_path, report)
    if options.path or options.val_path:  # where the run's own data are now; a task has no other
        run = dataclasses.replace(run, config=run.config.with_data_at(options.path, options.val_path))
    return _task(run, options)


def _task(run: "Run", options: _EvalOptions) -> dict[str, Any]:
    """The result of a task, after the options it was given."""
    from jaxlm.evals import tasks

    rows = options.limit, options.batch_size
    files: dict[str, Any] = {"prompts": options.prompts, "save": options.save}
    settings: dict[str, Any] = {name: str(path) for name, path in files.items() if path is not None}
    if options.task == "likelihood":
        results = tasks.likelihood(run, *rows)
    elif options.task == "prediction":
        given = options.sampling.temperature
        temperature: float | Literal["fit"] | None = None if given == GENERATION_SAMPLING.temperature else given
        if options.fit_temperature:
            temperature = "fit"
        results = tasks.prediction(run, *rows, temperature=temperature, **files)
    else:
        oracle, beam_width, sampling = options.oracle, options.beam_width, to_dict(options.sampling)
        if beam_width is not None:
            sampling = {name: sampling[name] for name in ("max_new_tokens", "forbidden_tokens")}
            settings["beam_width"] = beam_width
        settings |= {**sampling, "oracle": None if oracle is None else str(oracle)}
        results = tasks.generation(run, options.sampling, *rows, beam_width=beam_width, oracle=oracle, **files)
    return {"step": run.step, "task": options.task, **settings, **results}


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_result(result: dict[str, Any]) -> None:
    """A row for each quantity of a run, and the examples of a task."""
    run, examples = result["run"], result.get("examples", [])
    quantities = {name: value for name, value in result.items() if name not in ("run", "examples")}
    rows = [[name, _shown(value)] for name, value in quantities.items() if value is not None]
    print_table(run, ["quantity", "value"], rows)
    if examples:
        print_table("examples", list(examples[0]), [list(example.values()) for example in examples])


def _print_comparison(results: list[dict[str, Any]]) -> None:
    """A row for each run. What all runs share stands in the title, so that the table stays narrow."""
    names = dict.fromkeys(name for result in results for name in result if name not in ("run", "examples"))
    columns = {name: [result.get(name) for result in results] for name in names}
    shared = [
        name
        for name, (first, *rest) in columns.items()
        if not isinstance(first, float) and rest.count(first) == len(rest)
    ]
    title = ", ".join(f"{name} {_shown(columns[name][0])}" for name in shared if columns[name][0] is not None)
    differing = [name for name in names if name not in shared]
    rows = [
        [result["run"], *("-" if result.get(name) is None else _shown(result[name]) for name in differing)]
        for result in results
    ]
    print_table(title, ["run", *differing], rows)


def _check(options: _EvalOptions) -> None:
    check_at_least(options, 1, "limit", "batch_size", "beam_width")
    idle = set().union(*TASK_OPTIONS.values()) - TASK_OPTIONS[options.task]
    defaults = {field.name: field.default for field in dataclasses.fields(options)} | vars(GENERATION_SAMPLING)
    for name, value in (vars(options) | vars(options.sampling)).items():
        if name in idle and value != defaults[name]:
            readers = [task for task, names in TASK_OPTIONS.items() if name in names]
            raise UserError(
                f"--{name.replace('_', '-')} {value} is not for --task {options.task}: "
                f"leave it out, or use --task {' or '.join(readers)}"
            )
    temperature = options.sampling.temperature
    if options.fit_temperature and temperature != GENERATION_SAMPLING.temperature:
        raise UserError(f"--temperature {temperature} is not read beside --fit-temperature: leave one out")
    if options.save is not None and len(options.runs) > 1:
        raise UserError(f"--save {options.save} is one file, but there are {len(options.runs)} runs: give one")
    paths = {name: ", ".join(as_paths(getattr(options, name))) or None for name in ("path", "val_path")}
    data = {"path": paths["path"], "val-path": paths["val_path"], "special-tokens": options.special_tokens}
    for name, value in data.items():
        if options.prompts is not None and value is not None:
            raise UserError(f"--data.{name} {value} is not read beside --prompts {options.prompts}: leave one out")
