"""The packages that a GPU machine without a network lacks, as wheels: for `gpu.sh`.

python benchmarks/gpu_wheels.py fetch     downloads them to wheels/, in the versions that constraints.txt pins
python benchmarks/gpu_wheels.py missing   prints those that this machine lacks or has in a version out of bounds
"""

import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "wheels"
TARGET = {"python_version": "3.12", "python_full_version": "3.12.3"}
"""Python there; the machine is Linux on x86-64."""

THERE = {"jax", "jaxlib", "numpy", "matplotlib", "tokenizers", "safetensors", "pytest-xdist"}
"""Requirements that are not carried: they are there, or not needed there."""

FOR_THOSE = ("docstring_parser", "iniconfig", "markdown-it-py", "mdurl", "pluggy", "Pygments", "sortedcontainers")
FOR_THOSE += (
    "typing_extensions",
    "wadler_lindig",
    "hatchling",
    "packaging",
    "pathspec",
    "tomlkit",
    "trove-classifiers",
)
"""What those that are carried need, and what builds jaxlm."""


def requirements() -> Iterator[Requirement]:
    """What jaxlm and its tests require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        yield Requirement(line)


def pins() -> dict[str, str]:
    """The version of each package that constraints.txt pins for Python there."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(TARGET):
                found[canonicalize_name(pin.name)] = f"{pin.name}{pin.specifier}"
    return found


def carried() -> list[str]:
    """What is downloaded, with its pin; what constraints.txt does not know in its newest version."""
    names = [canonicalize_name(r.name) for r in requirements()] + [canonicalize_name(name) for name in FOR_THOSE]
    return [pins().get(name, name) for name in dict.fromkeys(names) if name not in THERE]


def fetch() -> None:
    """Downloads the wheels."""
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014")]
    only = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *only]
    subprocess.run([*command, "--dest", str(WHEELS), *carried()], check=True)
    size = sum(path.stat().st_size for path in WHEELS.glob("*.whl"))
    print(f"{WHEELS}: {len(list(WHEELS.glob('*.whl')))} wheels, {size / 1e6:.1f} MB")


def installed(name: str, bounds: SpecifierSet) -> bool:
    """Whether a package is here in a version within bounds."""
    try:
        return bounds.contains(importlib.metadata.version(name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def missing(folder: Path = WHEELS) -> list[Path]:
    """The wheels that this machine needs.

    Raises:
      LookupError: a package is missing for which there is no wheel.
    """
    bounds = {canonicalize_name(r.name): r.specifier for r in requirements()}
    wheels = {parse_wheel_filename(path.name)[0]: path for path in sorted(folder.glob("*.whl"))}
    lacking = [n for n in bounds if n not in wheels and n != "pytest-xdist" and not installed(n, bounds[n])]
    if lacking:
        raise LookupError(
            f"{', '.join(f'{name}{bounds[name]}' for name in lacking)} missing here and in {folder}: "
            "run benchmarks/gpu.sh wheels where there is a network, and bring the folder along"
        )
    return [path for name, path in wheels.items() if not installed(name, bounds.get(name, SpecifierSet()))]


if __name__ == "__main__":
    if sys.argv[1:] == ["fetch"]:
        fetch()
    elif sys.argv[1:] == ["missing"]:
        try:
            print("\n".join(map(str, missing())))
        except LookupError as error:
            print(f"gpu.sh: error: {error}", file=sys.stderr)
            sys.exit(2)
    else:
        sys.exit(__doc__)
