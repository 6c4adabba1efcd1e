"""The pages: links, paths and names lead somewhere, commands have the options shown, the Python of the README runs."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest

import jaxlm
from jaxlm.cli.main import COMMANDS, main

ROOT = Path(jaxlm.__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"^(?:jaxlm|torchref|tests|parity_tests|scripts|benchmarks|docs|data|\.ci)/[\w./-]*$")
LOCAL = ("data/cache",)
"""Paths that a page may name and that a fresh clone does not have."""


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page):
    """What stands in backticks in a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def blocks(page, language):
    """The fenced blocks of a language ("" = none named)."""
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page):
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@every_page
def test_a_page_begins_with_a_title_and_says_what_it_is_for(page):
    title, blank, first = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert re.match(r"(?!```)[\w`]", first), "no sentence below the title"


@every_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@every_page
def test_paths_exist(page):
    words = {word for span in spans(page) for word in span.split()}
    for word in filter(PATH.match, words):
        assert word.startswith(LOCAL) or (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_every_page_is_linked_from_the_readme(page):
    assert f"]({page.relative_to(ROOT)})" in (ROOT / "README.md").read_text(encoding="utf-8")


def names(text):
    """Dotted names that begin with jaxlm."""
    return set(re.findall(r"(?<![\w./-])jaxlm(?:\.[A-Za-z_]\w*)+(?![\w/])", text))


def resolve(name):
    """The module, or the thing in a module, that a dotted name means."""
    value = jaxlm
    for depth, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(name.split(".")[:depth]))
        value = getattr(value, part)
    return value


@every_page
def test_names_of_the_package_resolve(page):
    for name in names("\n".join([*spans(page), *blocks(page, "python")])):
        assert resolve(name) is not None


@every_page
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


COMMAND_BLOCK = re.compile(r"(jaxlm|make|git|python) ")
COMMAND = re.compile(r"(?:\.venv/bin/jaxlm|(?:python -m )?jaxlm) ([a-z-].*)")


def shown_lines(page):
    """What a page shows to be typed: the lines of blocks that begin with a command, and what stands in backticks."""
    typed = [block for block in blocks(page, "") if COMMAND_BLOCK.match(block)]
    return [line for block in typed for line in block.splitlines()] + spans(page)


def command_lines(page):
    """The words of each `jaxlm ...` that a page shows, comments cut off."""
    return [shlex.split(match[1], comments=True) for match in map(COMMAND.match, shown_lines(page)) if match]


@functools.cache
def help_of(name):
    """What `jaxlm NAME --help` prints, wide enough for every option to stand whole."""
    out = io.StringIO()
    with (
        mock.patch.dict("os.environ", {"COLUMNS": "300"}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        main([name, "--help"])
    return out.getvalue()


@every_page
def test_commands_and_their_options_exist(page):
    for words in command_lines(page):
        assert words[0] in COMMANDS or words[0] in ("--help", "--version"), words
        for word in words[1:]:
            option = word.split("=")[0]
            if re.fullmatch(r"--[a-z][\w.-]*", option) and option != "--help":
                assert re.search(rf"{re.escape(option)}(?![\w.-])", help_of(words[0])), f"{words}: {option}"


@every_page
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", "\n".join(shown_lines(page)), re.MULTILINE)) <= targets


def test_the_layout_names_every_file_as_its_docstring_does():
    layout = runpy.run_path(str(ROOT / "scripts" / "layout.py"))
    assert layout["page"]() == (ROOT / "docs" / "layout.md").read_text(encoding="utf-8"), "python scripts/layout.py"
    tree = layout["tree"]()
    files = [path for path in (ROOT / "jaxlm").rglob("*.py") if path.name != "__init__.py"]
    assert not [path for path in files if f" {path.name} " not in tree.replace(":", " ")]
    assert {path.relative_to(ROOT).parts[1] for path in files if path.parent.name != "jaxlm"} == {*layout["FOLDERS"]}
    assert not [row for row in tree.splitlines()[1:-1] if len(row.split(maxsplit=1)) < 2], "a file without a docstring"


def run_blocks(page, count=None, **scope):
    """Runs the Python of a page, one block after another, in one namespace."""
    for block in blocks(ROOT / page, "python")[:count]:
        exec(compile(block, page, "exec"), scope)


@pytest.fixture
def short_presets(tmp_path, monkeypatch, shakespeare):
    """An empty working folder, and presets of four steps."""
    preset = jaxlm.preset

    def short(name):
        config = preset(name)
        optim = dataclasses.replace(config.optim, warmup_steps=2)
        return dataclasses.replace(config, optim=optim, train=dataclasses.replace(config.train, steps=4))

    monkeypatch.setattr(jaxlm, "preset", short)
    monkeypatch.chdir(tmp_path)


def test_the_python_of_the_readme_trains_and_samples(short_presets, capsys):
    run_blocks("README.md", 2)
    first, text = capsys.readouterr().out.split("\n", 1)
    assert first.startswith("4 ")
    assert len(text) == 27


def test_the_python_of_the_pages_runs(short_presets):
    run_blocks("docs/train.md")
    run_blocks("docs/models.md")
    run_blocks("docs/optimizers.md")


@pytest.mark.slow
def test_the_python_about_decoding_runs(short_presets, capsys):
    config = jaxlm.preset("tiny")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_seq_len=64))
    jaxlm.train(config, "runs/nanogpt-cpu-1")
    run_blocks("docs/decode.md")
    assert capsys.readouterr().out.startswith("ROMEO:")
