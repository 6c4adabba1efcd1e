"""benchmarks/gpu.py with all of its parts, in tiny sizes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

SCRIPT = Path(jaxlm.__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_gives_its_rows(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    counts = {part: sum(row["part"] == part for row in found["rows"]) for part in found["part_seconds"]}
    assert counts == {"train": 12, "checks": 4, "run": 1, "decode": 4, "window": 3}
    assert not [row for row in found["rows"] if "failed" in row["note"]]
    assert all(row["value"] or row["note"].startswith("passed") for row in found["rows"])
