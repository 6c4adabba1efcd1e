"""Records: what one row gave under one seed, where and when. The report is made of them alone."""

import contextlib
import datetime
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm import strict_json
from jaxlm.data.files import staged
from jaxlm.errors import UserError
from jaxlm.reproduce.rows import Experiment, Numbers, Row, Training
from jaxlm.run.folder import provenance

FILE = "record.json"

_FIELDS: dict[str, Any] = {
    **{"row": str, "seed": int, "settings": dict, "versions": dict},
    **{"date": str, "device": str, "threads": int, "wall_s": (int, float)},
}
"""What every record has, besides its numbers."""

_TRAINED: dict[str, Any] = {
    **dict.fromkeys(("val_loss", "train_loss", "last_loss", "best_val_loss", "perplexity"), (int, float)),
    **{"parameters": int, "state_bytes": int, "curve": list, "samples": dict},
}
"""What that of a training has besides."""


def folder_of(root: Path, row: str, seed: int) -> Path:
    """Where a row's run or measurement lies; `root` is the experiment's folder."""
    return root / f"{row}-seed-{seed}"


def settings_of(exp: Experiment, row: Row, seed: int, quick: bool) -> dict[str, Any]:
    """What a record must have been made with to count for a row today; those of the rows that it needs as well."""
    settings = {"quick": True} if quick else {}
    settings |= row.settings(seed)
    for name in row.needs:
        needed = settings_of(exp, exp.row(name), seed, quick)
        settings |= {f"{name}: {field}": value for field, value in needed.items()}
    return json.loads(json.dumps(settings))


def new_record(exp: Experiment, row: Row, seed: int, quick: bool, wall_s: float, numbers: Numbers) -> Numbers:
    """A record of numbers that have just been computed on this machine."""
    return {
        "row": row.name,
        "seed": seed,
        "settings": settings_of(exp, row, seed, quick),
        **numbers,
        "wall_s": round(wall_s, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(),
        "threads": usable_cores(),
        "versions": provenance()["versions"],
    }


def device_name() -> str:
    """The accelerator's name, or the processor's."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_record(folder: Path, record: Numbers) -> None:
    """Keeps a record in the folder of its run or measurement."""
    with staged(folder / FILE) as path:
        path.write_text(strict_json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(exp: Experiment, root: Path, row: Row, seed: int, quick: bool) -> Numbers | None:
    """The record of a row under a seed; None if it is not done, was made with other settings, or lacks a quantity.

    Raises:
      UserError: the file is not a record.
    """
    file = folder_of(root, row.name, seed) / FILE
    if not file.exists():
        return None
    record = _checked(_read_json(file, "remove it, and the row is done again"), file)
    whole = not isinstance(row, Training) or all(name in record for name in row.quantities)
    return record if whole and record["settings"] == settings_of(exp, row, seed, quick) else None


def records_of(
    exp: Experiment, root: Path, report: Path, quick: bool
) -> tuple[dict[str, list[Numbers]], list[Numbers]]:
    """The records of every row in the order of the seeds: those under `root`, else those of an earlier report.

    Returns: those that count today, by row, and those of the earlier report that do not: their settings were others.
    """
    earlier = {(record["row"], record["seed"]): record for record in earlier_records(report)}
    counted: dict[str, list[Numbers]] = {}
    for row in exp.rows:
        found = [re.fullmatch(rf"{re.escape(row.name)}-seed-(\d+)", path.name) for path in root.glob("*-seed-*")]
        seeds = {int(match[1]) for match in found if match} | {seed for name, seed in earlier if name == row.name}
        counted[row.name] = []
        for seed in sorted(seeds):
            record = read_record(exp, root, row, seed, quick) or earlier.get((row.name, seed))
            if record is not None and record["settings"] == settings_of(exp, row, seed, quick):
                counted[row.name].append(record)
                earlier.pop((row.name, seed), None)
    return counted, list(earlier.values())


def earlier_records(report: Path) -> list[Numbers]:
    """The records that a report's JSON file holds, those of other settings too; none if there is no such file.

    Raises:
      UserError: it is not a report.
    """
    if not report.exists():
        return []
    content = _read_json(report, "move it away, or choose another --report")
    if not (isinstance(content, dict) and isinstance(content.get("records"), list)):
        raise UserError(f"{report} is not a report: move it away, or choose another --report")
    return [_checked(record, report) for record in [*content.get("other_settings", []), *content["records"]]]


def _read_json(file: Path, fix: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): {fix}") from None


def _checked(record: Any, file: Path) -> Numbers:
    """A record whose fields are of the types that the report reads.

    Raises:
      UserError: it is not one.
    """
    if not isinstance(record, dict):
        raise UserError(f"{file} holds {str(record)[:40]!r} in place of a record: remove it")
    wanted = _FIELDS | (_TRAINED if "val_loss" in record else {"markdown": list})
    for name, kind in wanted.items():
        if not isinstance(record.get(name), kind):
            raise UserError(f"{file} is not a record: its {name} is {record.get(name)!r}; remove it")
    return record


@contextlib.contextmanager
def locked(root: Path, row: str, seed: int) -> Iterator[None]:
    """Keeps other processes away from a row's folder, where the system has file locks (not on Windows).

    Raises:
      UserError: another process is at it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = folder_of(root, row, seed)
    path = folder.with_name(f".{folder.name}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is at {folder}: wait for it, or choose another --out") from None
        yield
