import gzip
import hashlib
import http.client
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from jaxlm.data import sources
from jaxlm.data.sources import _CHECKOUT, _SOURCES, _from_librispeech_tar, _from_wheel, _recipe, fetch, kind, names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A data cache of the test's own."""
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Two sources for the bytes b"hello": https, then a wheel of two members."""
    digest = hashlib.sha256(b"hello").hexdigest()
    (tmp_path / "greeting.toml").write_text(
        f'kind = "text"\n[[files]]\nname = "a.txt"\nsha256 = "{digest}"\nsplit = "all"\n'
        '[[files.sources]]\nkind = "https"\nurl = "https://example.invalid/a"\ntimeout_s = 1\n'
        '[[files.sources]]\nkind = "wheel"\nrequirement = "pkg==1"\nmembers = ["x", "y"]\ntimeout_s = 1\n'
    )
    monkeypatch.setattr(sources, "RECIPES", tmp_path)


def serve(monkeypatch, https=None, wheel=None):
    def source(content):
        def read(source):
            if content is None:
                raise OSError("no route")
            return content

        return read

    monkeypatch.setattr(sources, "_SOURCES", {"https": source(https), "wheel": source(wheel)})


def test_the_first_source_with_the_right_sha256_is_cached(recipe, monkeypatch, cache):
    serve(monkeypatch, https=b"tampered", wheel=b"hello")
    found = fetch("greeting")
    (path,) = found.train
    assert found.val == ()
    assert path == cache / "greeting" / "a.txt"
    assert path.read_bytes() == b"hello"
    serve(monkeypatch)  # the cache needs no source
    assert fetch("greeting") == found


def test_a_fetched_file_is_reported_and_a_cached_one_is_not(recipe, monkeypatch, capsys):
    serve(monkeypatch, wheel=b"hello")
    fetch("greeting")
    assert capsys.readouterr().err == (
        "fetching greeting/a.txt from https https://example.invalid/a ... failed\n"
        "fetching greeting/a.txt from wheel pkg==1 ... 5 bytes\n"
    )
    fetch("greeting")
    assert capsys.readouterr().err == ""


def test_the_cache_is_in_the_checkout_or_in_the_users_cache_folder(monkeypatch, tmp_path):
    assert sources.data_dir() == tmp_path / "cache"
    monkeypatch.delenv("JAXLM_DATA_DIR")
    assert sources.data_dir() == _CHECKOUT / "cache"
    monkeypatch.setattr(sources, "RECIPES", sources._INSTALLED)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sources.data_dir() == tmp_path / ".cache/jaxlm/data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert sources.data_dir() == tmp_path / ".cache/jaxlm/data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert sources.data_dir() == tmp_path / "caches/jaxlm/data"

    def homeless():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match="no home folder for the data cache: set JAXLM_DATA_DIR"):
        sources.data_dir()


def test_a_download_cut_short_falls_through_to_the_next_source(recipe, monkeypatch):
    serve(monkeypatch, wheel=b"hello")

    def cut(source):
        raise http.client.IncompleteRead(b"hel")

    monkeypatch.setitem(_SOURCES, "https", cut)
    assert fetch("greeting").train[0].read_bytes() == b"hello"


def test_a_cache_that_cannot_be_written_is_named(recipe, monkeypatch, tmp_path):
    serve(monkeypatch, wheel=b"hello")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .*set JAXLM_DATA_DIR"):
        fetch("greeting")


def test_a_damaged_cache_is_kept_aside_and_fetched_anew(recipe, monkeypatch, cache):
    serve(monkeypatch, https=b"hello")
    (path,) = fetch("greeting").train
    path.write_bytes(b"edited")
    assert fetch("greeting").train[0].read_bytes() == b"hello"
    assert (path.parent / "a.txt.damaged").read_bytes() == b"edited"


def test_when_nothing_works_the_message_lists_what_was_tried(recipe, monkeypatch, cache):
    serve(monkeypatch, wheel=b"tampered")
    with pytest.raises(ValueError, match="could not be fetched") as error:
        fetch("greeting")
    for words in (
        "https https://example.invalid/a: no route",
        "wheel pkg==1: sha256",
        str(cache / "greeting" / "a.txt"),
    ):
        assert words in str(error.value)
    assert not list(cache.rglob("a.txt*"))


def test_a_wheel_is_downloaded_not_installed_and_its_members_joined(recipe, monkeypatch):
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        with zipfile.ZipFile(command[command.index("--dest") + 1] + "/pkg-1-py3-none-any.whl", "w") as archive:
            archive.writestr("y", "lo")
            archive.writestr("x", "hel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(sources, "_SOURCES", {**_SOURCES, "https": _from_wheel})
    assert fetch("greeting").train[0].read_bytes() == b"hello"
    assert all("download" in command and "--no-deps" in command for command in commands)


# Several files -------------------------------------------------------------------------------------------------------


def test_each_file_of_a_recipe_goes_to_its_split(tmp_path, monkeypatch, cache):
    contents = {"a.csv": b"first", "b.csv": b"second", "c.csv": b"third"}
    files = "".join(
        f'[[files]]\nname = "{name}"\nsha256 = "{hashlib.sha256(content).hexdigest()}"\nsplit = "{split}"\n'
        f'[[files.sources]]\nkind = "https"\nurl = "https://{name}"\ntimeout_s = 1\n'
        for (name, content), split in zip(contents.items(), ("train", "val", "train"), strict=True)
    )
    (tmp_path / "three.toml").write_text('kind = "transcripts"\n' + files)
    monkeypatch.setattr(sources, "RECIPES", tmp_path)
    monkeypatch.setitem(_SOURCES, "https", lambda source: contents[source["url"].removeprefix("https://")])
    assert kind("three") == "transcripts"
    found = fetch("three")
    assert [path.name for path in found.train] == ["a.csv", "c.csv"]
    assert [path.name for path in found.val] == ["b.csv"]
    assert {path.name: path.read_bytes() for path in (cache / "three").iterdir()} == contents


@pytest.mark.parametrize("name", ["librispeech", "tinyshakespeare"])
def test_every_recipe_is_complete_and_packed_into_the_wheel(name):
    recipe = _recipe(name)
    assert recipe["kind"] in ("text", "transcripts")
    assert {file["split"] for file in recipe["files"]} in ({"all"}, {"train", "val"})
    for file in recipe["files"]:
        assert len(file["sha256"]) == 64
        assert {source["kind"] for source in file["sources"]} <= set(_SOURCES)
    project = (_CHECKOUT.parent / "pyproject.toml").read_text()
    assert f'"data/{name}.toml" = "jaxlm/recipes/{name}.toml"' in project
    assert names() == ["librispeech", "tinyshakespeare"]


def archive(chapters):
    """A LibriSpeech archive (tar.gz) of {chapter: lines}, with audio that is no audio and the folders' own entries."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for chapter, lines in chapters.items():
            folder = "LibriSpeech/test-clean/" + chapter.replace("-", "/")
            directory = tarfile.TarInfo(folder)
            directory.type = tarfile.DIRTYPE
            made.addfile(directory)
            for name, content in (
                (f"{chapter}-0000.flac", b"\0" * 5000),
                (f"{chapter}.trans.txt", "".join(line + "\n" for line in lines).encode(errors="surrogateescape")),
            ):
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(content)
                made.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Unseekable(io.RawIOBase):
    """A response: it can be read once, from the front."""

    def __init__(self, content):
        self._buffer = io.BytesIO(content)

    def readable(self):
        return True

    def read(self, size=-1):
        return self._buffer.read(size)


SOURCE = {"kind": "librispeech-tar", "url": "https://example.invalid/x.tar.gz", "timeout_s": 1}


def test_an_archive_becomes_a_table_sorted_by_id(monkeypatch):
    made = archive({"2-10": ["2-10-0000 IT'S LATE", "2-10-0001 GO"], "10-3": ["10-3-0000 A, B", "10-3-0001 SO IT IS"]})
    monkeypatch.setattr(sources, "_opened", lambda source: Unseekable(made))
    assert _from_librispeech_tar(SOURCE) == (
        b'id,transcript\r\n10-3-0000,"A, B"\r\n10-3-0001,SO IT IS\r\n2-10-0000,IT\'S LATE\r\n2-10-0001,GO\r\n'
    )


def test_the_real_tables_are_what_their_archives_become(librispeech, monkeypatch):
    for path in (*librispeech.train, *librispeech.val):
        chapters = {}
        for row in path.read_text().splitlines()[:0:-1]:
            identity, text = row.split(",")
            chapters.setdefault(identity.rsplit("-", 1)[0], []).append(f"{identity} {text}")
        assert len(chapters) > 80
        made = archive(chapters)
        monkeypatch.setattr(sources, "_opened", lambda source, made=made: Unseekable(made))
        assert _from_librispeech_tar(SOURCE) == path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: made[: len(made) // 2],
        lambda made: b"<html>not found</html>",
        lambda made: made[:300] + b"\xff\xff\xff\xff" + made[304:],
        lambda made: gzip.compress(b"no tar" * 500),
        lambda made: archive({"2-10": ["2-10-0000 CAF\udcc9"]}),
        lambda made: b"",
    ],
    ids=["cut", "a page", "damaged", "no tar", "no UTF-8", "nothing"],
)
def test_an_archive_that_is_none_is_named_with_its_address(tmp_path, monkeypatch, damage):
    content = damage(archive({"2-10": [f"2-10-{i:04} {i**9}" for i in range(900)]}))
    (tmp_path / "speech.toml").write_text(
        'kind = "transcripts"\n[[files]]\nname = "x.csv"\nsha256 = "' + "0" * 64 + '"\nsplit = "train"\n'
        '[[files.sources]]\nkind = "librispeech-tar"\nurl = "https://example.invalid/x.tar.gz"\ntimeout_s = 1\n'
    )
    monkeypatch.setattr(sources, "RECIPES", tmp_path)
    monkeypatch.setattr(sources, "_opened", lambda source: Unseekable(content))
    with pytest.raises(ValueError, match=r"librispeech-tar https://example.invalid/x.tar.gz: \S.*put the file"):
        fetch("speech")
