"""`jaxlm reproduce`: trains and measures the experiments of the course hand-outs, beside the published numbers."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxlm.cli.options import JsonOption, parse_options
from jaxlm.cli.output import print_json, print_table, say
from jaxlm.config.base import check_at_least
from jaxlm.errors import UserError
from jaxlm.reproduce.catalog import EXPERIMENTS, experiment

if TYPE_CHECKING:
    from jaxlm.reproduce.report import Line
    from jaxlm.reproduce.rows import Experiment

_NAME = tyro.conf.arg(metavar="NAME", help=f"Which experiment, one of {', '.join(EXPERIMENTS)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ReproduceOptions(JsonOption):
    """Train and measure an experiment of a course hand-out, and write its table beside the published numbers.

    What is done is not done again; what was stopped goes on.
    """

    name: Annotated[tyro.conf.Positional[str], _NAME]
    row: tuple[str, ...] = ()
    """Rows to do; default: all."""
    seeds: tuple[int, ...] = ()
    """Seeds of the trainings; default: each row's own."""
    quick: bool = False
    """Try the rows on tiny models, each in some seconds; the numbers mean nothing."""
    only_report: bool = False
    """Write the report of what is done, and do nothing else."""
    prompt: str | None = None
    """Also print what the trained models make of this prompt, side by side."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs."""
    report: Path | None = None
    """Folder of results.md and results/NAME.json, .csv and .png; default: --out. Results of earlier calls in it are
    kept."""
    processes: int | None = None
    """How many trainings at a time; default: one a core for small models, one for large ones and with --quick."""


def reproduce(arguments: list[str]) -> int:
    """`jaxlm reproduce NAME`: does what is not done yet, then writes and prints the table."""
    options = parse_options(_ReproduceOptions, arguments, "reproduce")
    check_at_least(options, 1, "processes")
    exp = experiment(options.name)
    for seed in options.seeds:
        if not 0 <= seed < 2**31:
            raise UserError(f"seed = {seed} is out of range: give 0 <= seed < 2^31")
    if options.quick and options.report is not None:
        raise UserError("--report with --quick would mix meaningless numbers into the results: leave one out")
    for name in options.row:
        exp.row(name)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file: give a folder")
    out = options.out / "quick" if options.quick else options.out
    report = out if options.report is None else options.report
    root = out / exp.name

    from jaxlm.compilation_cache import kept_programs
    from jaxlm.reproduce.records import usable_cores
    from jaxlm.reproduce.report import write_report
    from jaxlm.reproduce.rows import Training
    from jaxlm.reproduce.side_by_side import perform_all
    from jaxlm.reproduce.work import Job, StoppedError, jobs_of, perform

    seeds = list(options.seeds) or ([0] if options.quick else None)
    jobs = [] if options.only_report else jobs_of(exp, list(options.row), seeds)

    def done(job: Job) -> None:
        row, seed = job
        lines = write_report(exp, root, report, options.quick)
        own = [line for line in lines if line.row == row.name and seed in line.seeds]
        numbers = ", ".join(f"{line.quantity} {line.by_seed[line.seeds.index(seed)]:.4f}" for line in own)
        say(f"done: {row.name}, seed {seed}: {numbers}")

    write_report(exp, root, report, options.quick)  # what is missing says so, whatever happens from here on
    # A tiny model is trained in less time than a process starts in.
    processes = options.processes or (usable_cores() if exp.side_by_side and not options.quick else 1)
    with kept_programs():
        try:
            if processes > 1:
                trainings = [job for job in jobs if isinstance(job[0], Training)]
                perform_all(exp, trainings, root, options.quick, processes, done)
                jobs = [job for job in jobs if job not in trainings]  # what is timed runs alone
            for job in jobs:
                perform(exp, *job, root, options.quick)
                done(job)
        except StoppedError as stopped:
            say("stopped; the same command goes on from here")
            return 128 + stopped.signum
        lines = write_report(exp, root, report, options.quick)
        samples = {} if options.prompt is None else _samples(exp, root, options.prompt)
    if options.json:
        print_json({"experiment": exp.name, "table": [line._asdict() for line in lines], "samples": samples})
    else:
        _print(exp.title, lines)
        if samples:
            print_table(f"samples after {options.prompt!r}", list(samples), [list(samples.values())])
    say(f"report: {report / 'results.md'} and {report / 'results'}/{exp.name}.*")
    return 0


def _print(title: str, lines: list["Line"]) -> None:
    from jaxlm.reproduce.report import shown_number

    rows = [
        [
            line.label,
            line.quantity,
            shown_number(line.published),
            shown_number(line.target),
            shown_number(line.ours),
            line.verdict.replace("*", ""),
        ]
        for line in lines
    ]
    print_table(title, ["row", "quantity", "published", "at most", "ours", "result"], rows)


def _samples(exp: "Experiment", root: Path, prompt: str) -> dict[str, str]:
    """What the trained models make of a prompt, by label: the first seed that is done of each row that has samples."""
    from jaxlm.reproduce.rows import Training
    from jaxlm.reproduce.work import sample_of
    from jaxlm.run.folder import load_run

    texts = {}
    for row in exp.rows:
        done = sorted(root.glob(f"{row.name}-seed-*/record.json"))
        if isinstance(row, Training) and row.prompts and done:
            texts[row.label] = sample_of(load_run(done[0].parent), prompt)
    if not texts:
        raise UserError(f"{root} holds no finished training to sample from: leave --prompt out, or train first")
    return texts
