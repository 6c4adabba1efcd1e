"""The structure: imports point one way, files stay short, and importing jaxlm is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

PACKAGE = Path(jaxlm.__file__).parent

# Each module may import those of earlier rows (and of its own package, for optim).
LAYERS = [
    {"errors", "types"},
    {"schema"},
    {"model_config"},
    {"config"},
    {"presets", "tokenizer", "recipes", "rope", "masks", "linear", "loss"},
    {"scores", "console"},
    {"transcripts"},
    {"data", "cache", "attention"},
    {"modules", "stack", "local"},
    {"transformer", "baselines"},
    {"model"},
    {"optim", "convert"},
    {"metrics"},
    {"train"},
    {"sampling"},
    {"request"},
    {"naive"},
    {"decode"},
    {"checkpoint", "streaming", "beam", "report", "estimates", "maps"},
    {"recorder"},
    {"run", "programs"},
    {"texts", "oracles", "imports"},
    {"tasks"},
    {"parity"},
    {"cli_decode", "cli_convert", "cli_parity"},
    {"cli"},
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxlm":
            inner = node.module.split(".")[1:2]
            yield from inner or (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jaxlm."))


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: getattr(value, "name", value))
def test_imports_point_one_way(name, path):
    rank = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    wrong = [other for other in imported(path) if other != name and rank[other] >= rank[name]]
    assert not wrong, f"{path.name} is below {wrong}"


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


def test_no_file_passes_400_lines():
    root = PACKAGE.parent
    folders = [PACKAGE, root / "torchref", root / "tests", root / "parity_tests"]
    lengths = {p: len(p.read_text().splitlines()) for folder in folders for p in folder.rglob("*.py")}
    assert len(lengths) > 30
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_jaxlm_starts_no_backend_and_takes_no_torch():
    code = (
        "import sys, jaxlm; jaxlm.ModelConfig; print('jax' in sys.modules)\n"
        "import jaxlm.run; jaxlm.build_model; jaxlm.generate; jaxlm.optim.build_optimizer\n"
        "from jax._src import xla_bridge; print(bool(xla_bridge._backends), 'torch' in sys.modules)"
    )
    assert run_python(code) == ["False", "False", "False"]


def test_help_and_refusals_import_no_jax():
    code = (
        "import sys, jaxlm.cli as c\n"
        "c.main(['--help']); c.main(['train', 'nothing']); c.main(['presets', '--json'])\n"
        "print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    assert run_python(code)[-2:] == ["False", "False"]


def test_every_name_of_the_package_resolves():
    for name in jaxlm.__all__:
        assert getattr(jaxlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxlm.nothing  # noqa: B018
