"""Files of others: regular ones only, and JSON that says one thing."""

import json
import os

import pytest

from jaxlm.data import reading


def test_sound_json_is_read_as_it_is(tmp_path):
    value = {"a": [1, -2.5, 1e300, True, None, "é🙂\x1b"], "b": {"a": 2**63, "c": []}, "": "\ufeff"}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert reading.read_json(tmp_path / "a.json") == value
    (tmp_path / "link.json").symlink_to("a.json")
    assert reading.read_json(tmp_path / "link.json") == value
    deepest = "[" * reading.DEEPEST + "]" * reading.DEEPEST
    assert json.dumps(reading.parse_json(deepest)) == deepest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested deeper than 64"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands there twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "the key 'a' stands there twice"),
        *(
            ("[NaN]", "NaN is no number"),
            ("Infinity", "Infinity is no number"),
            ("[-Infinity]", "-Infinity is no number"),
        ),
        *(("[1e999]", "1e999 is out of range"), ("9" * 5000, "has 5000 digits"), (str(10**20), "has 21 digits")),
        *(('["\\ud800"]', "half a surrogate"), ('{"\\udfff": 1}', "half a surrogate")),
        *(
            ("", "Expecting value"),
            ("{'a': 1}", "double quotes"),
            ("[1,]", "trailing comma|Expecting value"),
            ("[1] x", "Extra data"),
        ),
    ],
)
def test_what_is_no_json_or_means_two_things_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        reading.parse_json(text)


def test_pairs_of_surrogates_are_characters():
    assert reading.parse_json('"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "missing", "large"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "a"
    make = {
        "pipe": lambda: os.mkfifo(path),  # opening it would wait for a writer
        "device": lambda: path.symlink_to("/dev/zero"),  # reading it would never end
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to("a"),
        "missing": lambda: None,
        "large": lambda: path.write_bytes(bytes(101)),
    }
    make[kind]()
    words = {"pipe": "pipe or a device", "device": "pipe or a device", "large": "101 bytes, more than 100"}
    with pytest.raises(OSError) as error:  # noqa: PT011  # the words are those of the system
        reading.read_regular(path, 100)
    assert words.get(kind, "o") in error.value.strerror


def test_toml_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text("a = " + "[" * 5000)
    with pytest.raises(ValueError, match="nested too deeply"):
        reading.read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, 1 << 22) for name in ("config.json", "generation_config.json", "params.json")),
        *((name, 1 << 24) for name in ("manifest.json", "model.safetensors.index.json")),
        ("tokenizer.json", 1 << 28),
    ],
)
def test_what_is_small_by_its_name_is_read_no_further(tmp_path, name, most):
    """30 MB of empty lists in a config.json took 1 GB."""
    with (tmp_path / name).open("wb") as file:
        file.write(b"[]")
        file.truncate(most + 1)
    with pytest.raises(OSError, match=f"it has {most + 1:,} bytes, more than {most:,}"):
        reading.read_json(tmp_path / name)
