"""A working folder with one run, which the tests of the commands share."""

import contextlib

import pytest
from support import FEW_STEPS, command


@pytest.fixture(scope="session")
def folder(tmp_path_factory, shakespeare):
    """A working folder with a short text of its own and runs/tiny-1, trained once."""
    root = tmp_path_factory.mktemp("work")
    (root / "text.txt").write_text(shakespeare.read_text()[:30_000])
    with contextlib.chdir(root):
        code, out, err = command(*FEW_STEPS, "--data.path", "text.txt")
    assert code == 0, err
    assert len(out.strip("\n")) > 0
    assert "runs/tiny-1 (step 30" in err
    return root


@pytest.fixture(autouse=True)
def inside(request, monkeypatch):
    """Works in that folder where a test asks for it."""
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))
