"""How options are read: what was given, defaults that depend on it, refusals, and the pages of help."""

import dataclasses
import re
from typing import Annotated, Literal

import pytest
import tyro
from support import command

from jaxlm.cli.main import COMMANDS
from jaxlm.cli.options import JsonOption, RunArgument, parse_options, read_text, with_kinds
from jaxlm.config import OptimConfig, SampleConfig
from jaxlm.config.base import Validated
from jaxlm.config.data import Paths
from jaxlm.config.presets import PRESETS, preset
from jaxlm.data.sources import names
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Validated):
    """A nested config.

    What only a developer needs to know.
    """

    width: int
    """Its width, in a sentence that is longer than a line of the source and so goes on
    in the next."""
    kind: Literal["a", "b"] = "a"
    """Its kind."""
    sizes: tuple[int, ...] = ()
    """Its sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(JsonOption):
    """Do something."""

    run: RunArgument
    """The run."""
    inner: Inner
    text: Annotated[str, tyro.conf.arg(name="a.text")] = "\n"
    """A text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Validated):
    """A nested config with paths."""

    path: Paths = None
    """Where it is."""


def defaults(given):
    return Outer(run=given.get("run"), inner=Inner(width=3 if given.get("json") else 5))


@pytest.mark.parametrize(
    ("arguments", "inner"),
    [
        ([], Inner(width=5)),
        (["--json"], Inner(width=3)),
        (["--inner.kind", "b", "--inner.sizes", "1", "2"], Inner(width=5, kind="b", sizes=(1, 2))),
        (["--inner.width", "5", "--json"], Inner(width=5)),
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_what_is_not_given_comes_from_the_defaults_for_what_is(arguments, inner, place):
    words = ["somewhere", *arguments] if place == "before" else [*arguments, "--no-json", "somewhere"]
    if place == "after" and "--json" in arguments:
        words = [*arguments, "--a.text", "x", "somewhere"]
    options = parse_options(Outer, words, "do", defaults)
    assert str(options.run) == "somewhere"
    assert options.inner == inner


def test_only_what_is_given_is_passed_on():
    seen = []
    parse_options(
        Outer, ["x", "--inner.sizes", "--a.text", ""], "do", lambda given: seen.append(given) or defaults(given)
    )
    (given,) = seen
    assert given.keys() == {"run", "inner", "text"}
    assert (given["inner"], given["text"]) == ({"sizes": ()}, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN is missing; see jaxlm do --help"),
        (["--inner.kind", "b"], "RUN is missing; see jaxlm do --help"),
        (["--jsn"], "Missing value for argument 'run'. Expected 1 values; see jaxlm do --help"),
        (["x", "--jsn"], "Unrecognized options: --jsn; perhaps you meant --json; see jaxlm do --help"),
        (["x", "y"], "Unrecognized options: y; see jaxlm do --help"),
        (
            ["x", "--inner.widht", "3"],
            "Unrecognized options: --inner.widht, 3; perhaps you meant --inner.width; see jaxlm do --help",
        ),
        (["x", "--inner.width", "wide"], "--inner.width: invalid literal for int() with base 10: 'wide'"),
        (["x", "--inner.kind", "c"], "invalid choice 'c' for argument '--inner.kind'. Expected one of ('a', 'b')"),
        (["x", "--a.text"], "Missing value for argument '--a.text'"),
    ],
)
@pytest.mark.parametrize("boxes", [True, False])
def test_refusals_are_one_line(monkeypatch, arguments, message, boxes):
    monkeypatch.setitem(tyro._experimental_options, "utf8_boxes", boxes)
    with pytest.raises(UserError) as refusal:
        parse_options(Outer, arguments, "do", defaults)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_defaults_those_of_the_fields_count():
    assert parse_options(JsonOption, [], "do") == JsonOption()
    assert parse_options(JsonOption, ["--json"], "do") == JsonOption(json=True)


def test_help_shows_descriptions_and_the_defaults_for_what_is_given(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for arguments, width in ((["--help"], 5), (["-h", "--json"], 3)):
        with pytest.raises(SystemExit) as end:
            parse_options(Outer, arguments, "do", defaults)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "usage: jaxlm do [-h]" in out
        assert "goes on in the next." in out
        assert f"(default: {width})" in out
    assert "{a,b}" in out
    assert re.search(r"RUN +The run. \(required\)", out)
    assert r"A text. (default: '\n')" in out
    assert "Do something." in out
    assert "developer" not in out


def test_kinds_bring_the_defaults_of_what_they_do_not_read():
    base = preset("llama-char")
    assert with_kinds(base, {"model": {}}) == base
    recurrent = with_kinds(base, {"model": {"family": "recurrent"}, "optim": {"name": "sgd"}})
    assert (recurrent.model.family, recurrent.model.window, recurrent.model.embed_dim) == ("recurrent", None, 128)
    assert (recurrent.optim.name, recurrent.optim.learning_rate) == ("sgd", base.optim.learning_rate)


def test_adam_drops_the_decay_of_the_config_and_brings_none_to_others():
    def decay(config, name):
        return with_kinds(config, {"model": {}, "optim": {"name": name}}).optim.weight_decay

    base = preset("nanogpt-cpu")
    assert {name: decay(base, name) for name in ("adam", "adamw", "adamsn", "sgd")} == {
        "adam": 0.0,
        "adamw": 0.2,
        "adamsn": 0.2,
        "sgd": 0.2,
    }
    with_adam = dataclasses.replace(base, optim=OptimConfig(name="adam"))
    assert (decay(with_adam, "adam"), decay(with_adam, "adamsn")) == (0.0, 0.1)
    asked = dataclasses.replace(base, optim=OptimConfig(name="adam", weight_decay=0.3))
    assert decay(asked, "adam") == 0.3


LEAKS = (
    "Validated|dataclass|TypedDict|Annotated|UserError|Config\\b|What every|properties|docstring|__|None = None"
    "|unset by default|fixed to|jaxlm: error"
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_of_help_describes_every_option_and_leaks_nothing(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: jaxlm {name} ")
    assert re.search(LEAKS, out) is None
    rows = [re.sub("^(│ |  )", "", line).rstrip("│ ") for line in out.splitlines()[1:]]
    options = [i for i, row in enumerate(rows) if re.match(r"--?\w|\[?[A-Z]{3,}", row)]
    positionals = [rows[i].split()[0] for i in options if not rows[i].startswith("-")]
    assert positionals == COMMANDS[name][1].split()
    assert len(options) > len(positionals) + 1
    for i in options:  # the description stands behind the option or in the next row
        description = " ".join(re.split("  +", rows[i], maxsplit=1)[1:]) or rows[i + 1].strip()
        assert len(description.partition("(default")[0].partition("(required")[0].split()) > 1, rows[i]


@pytest.mark.parametrize("name", ["train", "info"])
def test_presets_are_listed_where_one_may_be_given(name):
    assert set(PRESETS) <= set(re.split(r"[^a-z0-9-]+", command(name, "--help")[1]))


def test_help_has_the_defaults_of_the_preset_that_is_given():
    assert "(default: 500)" in command("train", "tiny", "--help")[1].split("--train.steps INT")[1].split("--train")[0]
    assert "(default: 5000)" in command("train", "--help", "shakespeare-char")[1]


def test_the_datasets_are_listed_where_one_may_be_given():
    assert set(names()) <= set(re.split(r"[^a-z]+", command("prepare", "--help")[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithPaths(JsonOption):
    """Read something."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[P]")] = "none"
    """A word."""
    data: Data
    """A nested config."""
    other: Paths = None
    """Another."""


@pytest.mark.parametrize(
    ("arguments", "path", "other", "preset"),
    [
        ([], "kept", None, "none"),
        (["--data.path", "a", "tiny"], ("a",), None, "tiny"),  # one path, and the word behind it is no path
        (["--data.path", "a", "--other", "x", "--data.path=b", "--data.path", "-"], ("a", "b", "-"), ("x",), "none"),
    ],
)
def test_an_option_of_paths_may_be_given_several_times(arguments, path, other, preset):
    asked = []

    def defaults(given):
        asked.append(given.get("data", {}))
        return WithPaths(data=Data(path="kept"))

    options = parse_options(WithPaths, arguments, "read", defaults)
    assert (options.data.path, options.other, options.preset) == (path, other, preset)
    assert ("path" in asked[0]) == ("--data.path" in arguments)  # what was not given is not there


def test_help_shows_the_paths_that_are_the_default(capsys):
    for path, shown in ((None, ""), ("one", "(default: one)"), (("one", "two"), "(default: one two)")):
        with pytest.raises(SystemExit):
            parse_options(WithPaths, ["--help"], "read", lambda given, path=path: WithPaths(data=Data(path=path)))
        said = capsys.readouterr().out.split("--data.path PATH")[-1].replace("│", " ")
        assert " ".join(said.split()).startswith(f"Where it is. {shown}".strip())
        assert ("default: one" in said) == bool(shown)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    with pytest.warns(UserWarning, match=r"a.txt begins with a byte-order mark, which is left out"):
        assert read_text(str(tmp_path / "a.txt")) == "a\n"


def test_texts_are_utf8_whatever_the_locale():
    def text(typed):
        """As Python hands it over where the locale is ASCII."""
        return parse_options(Outer, ["x", "--a.text", typed.decode("ascii", "surrogateescape")], "do", defaults).text

    assert text("a ž日".encode()) == "a ž日"
    assert text(b"a\xff") == "a\udcff"  # refused where it is read
    sample = parse_options(SampleConfig, ["--prompt", "\udcc5\udcbe", "--stop", "\udcc5\udcbe", "b"], "do")
    assert (sample.prompt, sample.stop) == ("ž", ("ž", "b"))


def test_files_that_a_shell_made_of_a_pattern_are_told_from_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("a")
    said = command("train", "--data.path", "a.txt", "b.txt")
    assert (said[0], "preset 'b.txt' is a file: give --data.path before each of several" in said[2]) == (2, True)
    said = command("train", "tiny", "--data.path", "a.txt", "b.txt", "c.txt")
    assert "Unrecognized options: b.txt, c.txt; of several files, each needs the option before it" in said[2]
    assert "of several files" not in command("train", "tiny", "words")[2]
