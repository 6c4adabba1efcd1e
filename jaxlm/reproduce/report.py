"""The report of an experiment: every row beside the published numbers, as Markdown, CSV, JSON and a picture.

results.md holds the tables of all experiments; results/NAME.json their records, from which all else is made.
"""

import csv
import html
import io
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import strict_json
from jaxlm.data.files import staged
from jaxlm.reproduce.catalog import EXPERIMENTS, experiment
from jaxlm.reproduce.records import records_of
from jaxlm.reproduce.rows import Experiment, Measurement, Numbers, Row, Training
from jaxlm.run.plots import style

Records = dict[str, list[Numbers]]
"""The records of each row, one for each seed that is done."""


class Line(NamedTuple):
    """A row of the table: one quantity of one row of the experiment."""

    row: str
    label: str
    quantity: str
    published: float | None
    target: float | None
    ours: float | None
    """The mean over the seeds that are done; None = not run."""
    by_seed: tuple[float, ...]
    seeds: tuple[int, ...]
    verdict: str
    """reached, **not reached**, not run, or nothing where there is no target."""
    device: str
    wall_s: float | None
    """Mean seconds of a seed."""
    date: str
    command: str
    note: str


def lines_of(exp: Experiment, records: Records, quick: bool = False) -> list[Line]:
    """The table of an experiment; quick versions reach nothing and miss nothing."""
    lines = [_line(exp, row, quantity, records) for row in exp.rows for quantity in row.quantities]
    return [line._replace(verdict="quick version") if quick and line.ours is not None else line for line in lines]


def _line(exp: Experiment, row: Row, quantity: str, records: Records) -> Line:
    done = [record for record in records[row.name] if isinstance(record.get(quantity), (int, float))]
    values = tuple(float(record[quantity]) for record in done)
    ours = statistics.mean(values) if values else None
    target, target_note = _target(exp, row, quantity, records)
    devices = dict.fromkeys(f"{record['device']}, {_threads(record)}" for record in done)
    return Line(
        row=row.name,
        label=row.label,
        quantity=quantity,
        published=row.published.get(quantity),
        target=target,
        ours=ours,
        by_seed=values,
        seeds=tuple(record["seed"] for record in done),
        verdict=_verdict(ours, target, _seeds_done(row, done), target_note),
        device="; ".join(devices),
        wall_s=statistics.mean(record["wall_s"] for record in done) if done else None,
        date=max((record["date"] for record in done), default=""),
        command=f"jaxlm reproduce {exp.name} --row {row.name}",
        note=row.note,
    )


def _threads(record: Numbers) -> str:
    return f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def _seeds_done(row: Row, done: list[Numbers]) -> str:
    """Says how many of a row's seeds are done, if not all are."""
    count = len(set(row.seeds) & {record["seed"] for record in done})
    return "" if count == len(row.seeds) else f"{count} of {len(row.seeds)} seeds"


def _target(exp: Experiment, row: Row, quantity: str, records: Records) -> tuple[float | None, str]:
    """The target, and what is missing for it."""
    if row.below is None or quantity != "val_loss":
        return row.targets.get(quantity), ""
    name, margin = row.below
    others = records[name]
    missing = _seeds_done(exp.row(name), others)
    if not others:
        return None, f"the target, row {name}, is not run"
    mean = statistics.mean(record["val_loss"] for record in others)
    return mean + margin, f"of the target {missing}" if missing else ""


def _verdict(ours: float | None, target: float | None, seeds: str, target_note: str) -> str:
    if ours is None:
        return "not run"
    remarks = "; ".join(filter(None, (seeds, target_note)))
    if target is None:
        return remarks
    return ("reached" if ours <= target else "**not reached**") + (f" ({remarks})" if remarks else "")


def table(lines: list[Line]) -> list[str]:
    """The lines as a table of Markdown, and below it the notes."""
    notes = list(dict.fromkeys(line.note for line in lines if line.note))
    header = ["row", "quantity", "published", "target", "ours", "seed: result", "verdict", "seconds", "device", "date"]
    rows = []
    for line in lines:
        by_seed = zip(line.seeds, line.by_seed, strict=True)
        rows.append(
            [
                line.label + (f" [{notes.index(line.note) + 1}]" if line.note else ""),
                line.quantity,
                shown_number(line.published),
                "" if line.target is None else f"<= {shown_number(line.target)}",
                shown_number(line.ours),
                ", ".join(f"{seed}: {shown_number(value)}" for seed, value in by_seed),
                line.verdict,
                "" if line.wall_s is None else f"{line.wall_s:,.0f}",
                line.device,
                line.date,
                f"`{line.command}`",
            ]
        )
    page = ["| " + " | ".join(cells) + " |" for cells in ([*header, "command"], ["---"] * (len(header) + 1), *rows)]
    return [*page, "", *(f"{number}. {note}." for number, note in enumerate(notes, 1))]


def shown_number(value: float | None) -> str:
    """A number with four digits after the point, or four in all; nothing for None."""
    if value is None:
        return ""
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}"
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 else f"{value:.4g}"


def write_report(exp: Experiment, root: Path, report: Path, quick: bool = False) -> list[Line]:
    """Writes what is known of an experiment into a folder; returns its table.

    Args:
      root: the experiment's runs and measurements.
      quick: they are quick versions.
      report: folder of results.md and results/; records of an earlier report in it are kept.

    Raises:
      UserError: something there is no report, or cannot be written.
    """
    folder = report / "results"
    records, others = records_of(exp, root, folder / f"{exp.name}.json", quick)
    lines = lines_of(exp, records, quick)
    summary = [line._asdict() for line in lines]
    flat = [record for done in records.values() for record in done]
    content = {"experiment": exp.name, "title": exp.title, "table": summary, "records": flat, "other_settings": others}
    _write(folder / f"{exp.name}.json", strict_json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _write(folder / f"{exp.name}.csv", _csv(summary))
    picture = folder / f"{exp.name}.png"
    with style():
        figure = exp.draw(records)
        if figure is None:
            picture.unlink(missing_ok=True)
        else:
            figure.suptitle(f"{exp.title}: jaxlm reproduce {exp.name}", fontsize=10)
            with staged(picture) as path:
                figure.savefig(path, format="png")
    _write(report / "results.md", "\n".join(_page(exp, folder, quick)) + "\n")
    return lines


def _write(path: Path, text: str) -> None:
    with staged(path) as staging:
        staging.write_text(text, encoding="utf-8")


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _page(written: Experiment, folder: Path, quick: bool) -> list[str]:
    """results.md: the experiments whose JSON files lie in the folder; `written` has just been put there."""
    page = [
        "# Results",
        "",
        "This page is written by `jaxlm reproduce`; do not edit it. Losses are in nats per token, exact over the whole",
        "validation split, after the last step. *Ours* is the mean over the seeds, the target what it should be at",
        "most. Seconds are the wall time of one seed, often beside other work. A row that missed its target says so.",
        "",
    ]
    for name in EXPERIMENTS:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        exp = written if name == written.name else experiment(name)
        records, _ = records_of(exp, folder, file, quick)
        page += [f"## {exp.title}", "", *table(lines_of(exp, records, quick)), ""]
        if versions := sorted({_versions(record) for done in records.values() for record in done}):
            page += [f"Versions: {'; '.join(versions)}.", ""]
        if (folder / f"{name}.png").exists():
            page += [f"![{exp.title}](results/{name}.png)", "", f"Drawn by `jaxlm reproduce {name}`.", ""]
        page += _details(exp, records)
    return page


def _versions(record: Numbers) -> str:
    return f"jax {record['versions']['jax']}, optax {record['versions']['optax']}"


def _details(exp: Experiment, records: Records) -> list[str]:
    """What each trained row has besides its line, and what each measured row has found."""
    page: list[str] = []
    trained = {row.label: records[row.name] for row in exp.rows if isinstance(row, Training) and records[row.name]}
    if trained:
        sizes = ("parameters", "optimizer state, bytes")
        header = ["row", *sizes, "last batch", "training split", "validation", "best", "perplexity"]
        page += [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
        for label, done in trained.items():
            means = [
                statistics.mean(r[name] for r in done)
                for name in ("last_loss", "train_loss", "val_loss", "best_val_loss", "perplexity")
            ]
            counts = f"{done[0]['parameters']:,} | {done[0]['state_bytes']:,}"
            page.append(f"| {label} | {counts} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
        page.append("")
    for row in exp.rows:
        if isinstance(row, Measurement) and records[row.name]:
            page += [f"**{row.label}**", "", *records[row.name][0]["markdown"], ""]
    for prompt in dict.fromkeys(prompt for done in trained.values() for prompt in done[0]["samples"]):
        texts = {label: done[0]["samples"][prompt] for label, done in trained.items() if prompt in done[0]["samples"]}
        page += [f"Samples after `{prompt!r}`, first seed:", "", *_side_by_side(texts), ""]
    return page


def _side_by_side(texts: dict[str, str]) -> list[str]:
    """A table of Markdown with a column for each text."""
    cells = [
        "<br>".join(html.escape(line).replace("|", "&#124;") for line in text.split("\n")) for text in texts.values()
    ]
    return ["| " + " | ".join(row) + " |" for row in (list(texts), ["---"] * len(texts), cells)]
