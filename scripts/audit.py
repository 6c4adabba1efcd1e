"""Checks the security of jaxlm: its own tests of it, and the pinned packages against the known vulnerabilities.

python scripts/audit.py     (make audit)

pip-audit asks the package index for the vulnerabilities of each version in constraints.txt. Where it reaches none, the
last line says so. Exit code: 0 all is well, 1 a test failed or a version is vulnerable, 2 the packages could not be
audited.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("security", "terminal", "fuzz", "bad_inputs")]
TESTS += [f"tests/data/test_{name}.py" for name in ("reading", "arrays", "tokenizer_json", "sources")]


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit code and what to say of a report of pip-audit."""
    packages = report["dependencies"]
    audited = [one for one in packages if "skip_reason" not in one]
    lines = [
        f"{one['name']} {one['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version'}"
        for one in audited
        for flaw in one["vulns"]
    ]
    if lines:
        return 1, lines
    if not audited:
        return 2, [f"the {len(packages)} pinned packages were not audited: no database of vulnerabilities was reached"]
    left = f", {len(packages) - len(audited)} of which nothing is known" if len(audited) < len(packages) else ""
    return 0, [f"{len(packages)} pinned packages{left}: no known vulnerability"]


def _packages() -> tuple[int, list[str]]:
    """Runs pip-audit on the pinned versions."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--format", "json"]
    command += ["--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return verdict(json.loads(done.stdout))
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return 2, [f"the pinned packages were not audited: pip-audit failed ({reason})"]


def main() -> int:
    """Runs both."""
    own = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TESTS], cwd=ROOT).returncode
    code, lines = _packages()
    print("own tests:", "passed" if own == 0 else "FAILED")
    print("\n".join(f"audit: {line}" for line in lines))
    return 1 if own else code


if __name__ == "__main__":
    sys.exit(main())
