"""What no file of jaxlm may do: unpickle, run code of others, take what is not HTTPS, follow links of others."""

import ast
import os
import runpy
import stat
import tomllib
from pathlib import Path

import pytest

from jaxlm import compilation_cache
from jaxlm.data.files import staged, staging_path
from jaxlm.data.sources import RECIPES

ROOT = Path(__file__).parent.parent
FILES = sorted(path for name in ("jaxlm", "torchref", "scripts") for path in (ROOT / name).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
RUNS_A_FOLDERS_CODE = "jaxlm/parity/source.py"
"""`jaxlm parity --reference nanogpt DIR` imports DIR/model.py, as it says: that is what it compares with."""


def calls(tree):
    """(dotted name, keywords) of each call; a keyword is its constant or its source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords}
            values = {name: getattr(value, "value", ast.unparse(value)) for name, value in keywords.items()}
            stars = [ast.unparse(value) for name, value in keywords.items() if name is None]
            yield ast.unparse(node.func), values, stars


def problems(source):
    """What a file does that it may not."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]
    for name, keywords, stars in calls(tree):
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"):
            found.append(f"calls {name}")
        if last == "load" and name.split(".")[0] in ("np", "numpy") and keywords.get("allow_pickle") is not False:
            found.append("numpy.load without allow_pickle=False")
        if name.startswith(("np.save", "numpy.save")) and keywords.get("allow_pickle") is True:
            found.append(f"{name} with pickle")
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if last in ("from_pretrained", "from_config") and "transformers" in name:
            told = {"local", "own"} & set(stars) and "'trust_remote_code': False" in source.replace('"', "'")
            if keywords.get("trust_remote_code") is not False and not told:
                found.append(f"{name} without trust_remote_code=False")
        if keywords.get("shell") is True:
            found.append(f"{name} with a shell")
        if name.endswith("exec_module"):
            found.append("runs a module of others")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_unpickles_or_runs_what_it_reads(path):
    allowed = ["runs a module of others"] if str(path.relative_to(ROOT)) == RUNS_A_FOLDERS_CODE else []
    assert problems(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "from joblib import load",
            "eval(x)",
            "exec(x)",
            "np.load(f)",
            "np.load(f, allow_pickle=True)",
        ),
        *("torch.load(f)", "torch.load(f, weights_only=False)", "subprocess.run(x, shell=True)", "tempfile.mktemp()"),
        "transformers.AutoModel.from_pretrained(f)",
        "transformers.AutoModel.from_pretrained(f, trust_remote_code=True)",
        "spec.loader.exec_module(module)",
    ],
)
def test_what_is_forbidden_is_found(line):
    assert len(problems(line)) == 1


def test_recipes_name_https_alone_and_every_sha256():
    for path in RECIPES.glob("*.toml"):
        recipe = tomllib.loads(path.read_text())
        sources = [source for file in recipe["files"] for source in file["sources"]]
        assert all(source.get("url", "https://").startswith("https://") for source in sources)
        assert all(len(file["sha256"]) == 64 for file in recipe["files"])


def test_the_cache_of_programs_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    assert compilation_cache._create_folder() == str(tmp_path / "xla")
    assert stat.S_IMODE((tmp_path / "xla").stat().st_mode) == 0o700
    (tmp_path / "xla").chmod(0o777)
    with pytest.warns(UserWarning, match="every user can write there"):
        assert compilation_cache._create_folder() is None


def test_what_is_written_aside_follows_no_link(tmp_path):
    """The name can be guessed; in a folder of several users, another may have put a link there."""
    (tmp_path / "victim").write_text("mine")
    target = tmp_path / "a.json"
    staging_path(target, os.getpid()).symlink_to(tmp_path / "victim")
    with staged(target) as path:
        path.write_text("new")
    assert (target.read_text(), (tmp_path / "victim").read_text()) == ("new", "mine")


def package(name, **fields):
    return {"name": name, "version": "1", "vulns": [], **fields}


FLAW = {"id": "PYSEC-1", "fix_versions": ["2"], "aliases": [], "description": ""}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([package("a"), package("b")], 0, "2 pinned packages: no known vulnerability"),
        ([package("a"), {"name": "b", "skip_reason": "gone"}], 0, "2 pinned packages, 1 of which nothing is known"),
        ([{"name": "b", "skip_reason": "gone"}], 2, "1 pinned packages were not audited"),
        ([package("a", vulns=[FLAW]), package("b")], 1, "a 1: PYSEC-1, mended in 2"),
    ],
)
def test_the_audit_tells_vulnerable_from_unknown(packages, code, words):
    verdict = runpy.run_path(str(ROOT / "scripts" / "audit.py"))["verdict"]
    found, lines = verdict({"dependencies": packages})
    assert found == code
    assert words in lines[0]
