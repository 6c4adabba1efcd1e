"""The Python that README and docs/parity.md show: a run, the same model in PyTorch, and their comparison."""

import re
from pathlib import Path

import pytest
from support import command

import jaxlm
from jaxlm.parity import report

ROOT = Path(jaxlm.__file__).parent.parent
SIZES = ["--model.num-layers", 1, "--model.embed-dim", 12, "--model.max-seq-len", 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a run of one step at the place that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    options = [
        "--data.path",
        folder / "text.txt",
        "--train.steps",
        1,
        "--optim.warmup-steps",
        0,
        "--sample.max-new-tokens",
        3,
    ]
    assert (
        command(
            "train", "tiny", *options, *SIZES, "--data.val-fraction", 0.3, "--out", folder / "runs" / "nanogpt-cpu-1"
        )[0]
        == 0
    )
    return folder


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_comparison_of_the_readme_passes(folder, capsys):
    run = jaxlm.load_run(folder / "runs" / "nanogpt-cpu-1")
    exec(compile(blocks("README.md")[2], "README.md", "exec"), {"jaxlm": jaxlm, "run": run})
    assert capsys.readouterr().out == "True None\n"


def test_the_same_model_runs_in_torch(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(jaxlm.parity, "check", lambda cfg, params: report.Report(()))  # the test above runs it
    scope = {}
    for block in blocks("docs/parity.md")[:2]:
        exec(compile(block, "docs/parity.md", "exec"), scope)
    assert scope["network"](scope["torch_tokens"]).shape == (2, 16, 28)
