"""The structure: imports point one way, files stay short, and importing jaxlm is light."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

PACKAGE = Path(jaxlm.__file__).parent

# Each folder may import from those above it and from itself. What lies beside the folders is for all of them.
FOLDERS = runpy.run_path(str(PACKAGE.parent / "scripts" / "layout.py"))["FOLDERS"]
FOR_ALL = {"errors", "terminal", "types", "finite", "strict_json", "compilation_cache"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported_folders(path):
    """The folder, or file beside the folders, that each import of jaxlm names."""
    for name in imported_names(path):
        package, *parts = name.split(".")
        if package == "jaxlm":
            yield parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_those_above_it(path):
    allowed = FOR_ALL | {*FOLDERS[: FOLDERS.index(path.relative_to(PACKAGE).parts[0]) + 1]}
    assert set(imported_folders(path)) <= allowed


def test_every_folder_is_listed():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} > FOR_ALL


def imported_names(path):
    """Every module a file imports, at its top or in a function, with the names taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_reference_imports_no_jax_and_of_jaxlm_only_its_configs():
    files = sorted((PACKAGE.parent / "torchref").rglob("*.py"))
    names = {name for path in files for name in imported_names(path)}
    assert "torch" in names
    assert {name.split(".")[0] for name in names} <= {"torch", "torchref", "jaxlm", *sys.stdlib_module_names}
    of_jaxlm = {name for name in names if name.split(".")[0] == "jaxlm"}
    assert {name for name in of_jaxlm if not f"{name}.".startswith("jaxlm.config.")} == set()


def test_what_needs_64_bits_is_marked_in_files_whose_names_say_so():
    """By the name a file is not even imported: checking.py."""
    for path in (file for name in ("tests", "parity_tests") for file in (PACKAGE.parent / name).rglob("test_*.py")):
        lines = path.read_text().splitlines()
        assert ("pytestmark = pytest.mark.x64" in lines) == path.stem.endswith("_x64"), path
        assert not any(line.startswith("@pytest.mark.x64") for line in lines), path


def test_no_file_passes_400_lines():
    root = PACKAGE.parent
    folders = [root / name for name in ("jaxlm", "torchref", "tests", "parity_tests", "scripts", "benchmarks")]
    lengths = {p: len(p.read_text().splitlines()) for folder in folders for p in folder.rglob("*.py")}
    assert len(lengths) > 30
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}


def test_no_class_passes_150_lines():
    """But a config, whose fields are documented one by one."""
    long = {
        f"{path.stem}.{node.name}": node.end_lineno - node.lineno + 1
        for path in [*FILES, *(PACKAGE.parent / "torchref").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= 150
    }
    assert set(long) == {"model.ModelConfig"}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_jaxlm_starts_no_backend_and_takes_no_torch():
    code = (
        "import sys, jaxlm; jaxlm.ModelConfig; print('jax' in sys.modules)\n"
        "import jaxlm.run.training; jaxlm.build_model; jaxlm.generate; jaxlm.optim.build_optimizer\n"
        "from jax._src import xla_bridge; print(bool(xla_bridge._backends), 'torch' in sys.modules)"
    )
    assert run_python(code) == ["False", "False", "False"]


def test_help_and_refusals_import_no_jax():
    code = (
        "import sys, jaxlm.cli.main as c\n"
        "c.main(['--help']); c.main(['train', 'nothing']); c.main(['presets', '--json']); c.main(['runs', '.'])\n"
        "[c.main([command, '--help']) for command in c.COMMANDS]\n"
        "print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    assert run_python(code)[-2:] == ["False", "False"]


def test_dir_shows_the_public_names_and_no_others():
    assert dir(jaxlm) == sorted(jaxlm.__all__)
    assert not any(name.startswith("_") for name in dir(jaxlm))


def test_every_name_of_the_package_resolves():
    for name in jaxlm.__all__:
        assert getattr(jaxlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxlm.nothing  # noqa: B018
