"""Records: what one row gave under one seed, where and when. The report is made of them alone."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from jaxlm.data.files import staged
from jaxlm.errors import UserError
from jaxlm.reproduce.rows import Experiment, Numbers, Row, Training
from jaxlm.run.folder import provenance

FILE = "record.json"


def folder_of(root: Path, row: str, seed: int) -> Path:
    """Where a row's run or measurement lies; `root` is the experiment's folder."""
    return root / f"{row}-seed-{seed}"


def new_record(row: Row, seed: int, wall_s: float, numbers: Numbers) -> Numbers:
    """A record of numbers that have just been computed on this machine."""
    made = provenance()
    return {
        "row": row.name,
        "seed": seed,
        "settings": settings_of(row, seed),
        **numbers,
        "wall_s": round(wall_s, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(),
        "threads": usable_cores(),
        "versions": made["versions"],
    }


def settings_of(row: Row, seed: int) -> dict[str, Any]:
    """What a record must have been made with to count for a row today."""
    return json.loads(json.dumps(row.settings(seed))) if isinstance(row, Training) else {}


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
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(root: Path, row: Row, seed: int) -> Numbers | None:
    """The record of a row under a seed; None if it is not done, or was made with other settings.

    Raises:
      UserError: the file is not a record.
    """
    file = folder_of(root, row.name, seed) / FILE
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if record["settings"] == settings_of(row, seed) else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a record ({error}): remove it, and the row is measured again") from None


def records_of(experiment: Experiment, root: Path, report: Path) -> dict[str, list[Numbers]]:
    """The records of every row, by seed: those under `root`, else those of an earlier report.

    Those made with other settings than the row has today do not count.
    """
    earlier = {(record["row"], record["seed"]): record for record in earlier_records(report)}
    found: dict[str, list[Numbers]] = {}
    for row in experiment.rows:
        files = root.glob(f"{row.name}-seed-*/{FILE}")
        on_disk = [int(file.parent.name.rpartition("-")[2]) for file in files]
        in_report = [seed for name, seed in earlier if name == row.name]
        seeds = sorted({*on_disk, *in_report})
        records = [read_record(root, row, seed) or earlier.get((row.name, seed)) for seed in seeds]
        found[row.name] = [
            record
            for seed, record in zip(seeds, records, strict=True)
            if record is not None and record["settings"] == settings_of(row, seed)
        ]
    return found


def earlier_records(report: Path) -> list[Numbers]:
    """The records that a report's JSON file holds; none if there is no such file.

    Raises:
      UserError: it is not a report.
    """
    if not report.exists():
        return []
    try:
        return list(json.loads(report.read_text(encoding="utf-8"))["records"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report} is not a report ({error}): move it away, or choose another --report") from None
