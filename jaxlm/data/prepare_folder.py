"""A folder of token shards while it is written: its plan, its journal, and the shard under way.

plan.json  progress.journal  tokenizer.json  shard-00000.bin  ...
"""

import contextlib
import fcntl
import hashlib
import json
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxlm.data.documents import FIRST, Piece, Place
from jaxlm.data.files import staged, unwritable
from jaxlm.data.reading import parse_json, read_json, read_regular
from jaxlm.data.shards import FORMAT, MANIFEST, PLAN
from jaxlm.errors import UserError

JOURNAL = "progress.journal"
"""A line for each finished shard: its entry of the manifest, and where the next one begins.

Not called .jsonl: a corpus in whose folder `out` lies must not read it.
"""

FULL = "free some space, and give the same command again: what is finished is kept"
ELSEWHERE = "choose another --out"


class TextChain:
    """A sha256 of texts in their order, which goes on from its value alone."""

    def __init__(self, sha256: str = "") -> None:
        self.sha256 = sha256

    def add(self, text: str, ends: bool = True) -> None:
        """Appends a text, or a part of one that does not end here."""
        self.sha256 = hashlib.sha256(f"{self.sha256} {ends:d} {text}".encode()).hexdigest()

    def through(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, each of which is appended as it passes."""
        for text in texts:
            self.add(text)
            yield text


class PlannedFolder:
    """A folder that has its plan, and is locked."""

    def __init__(self, path: Path, plan: dict[str, Any], new_plan: dict[str, Any]) -> None:
        self.path, self.plan, self.new_plan = path, plan, new_plan
        self.has_other_files = plan["files"] != new_plan["files"]
        self.damaged = f"delete {path}, and prepare again"

    def save(self, **changes: Any) -> None:
        """Changes entries of the plan."""
        self.plan = {**self.plan, **changes}
        write_json(self.path / PLAN, self.plan)


@contextlib.contextmanager
def begun(out: Path, plan: dict[str, Any]) -> Iterator[PlannedFolder]:
    """Writes the plan into a new folder, or compares it with the one that is there. Files may have changed.

    Raises:
      UserError: the folder was begun with other options, holds something else, is in use, or cannot be written.
    """
    with _writing(out):
        _check_free(out)
        if not (out / PLAN).exists():
            write_json(out / PLAN, plan)
    with alone(out):
        _check_free(out)  # whoever had the lock may have finished
        old = _read_plan(out)
        for name in sorted((old.keys() | plan.keys()) - {"files", "sample"}):
            if old.get(name) != plan.get(name):
                raise UserError(
                    f"{out} was begun with {name} = {old.get(name)!r}, not {plan.get(name)!r}: give the same options "
                    "to go on, or choose another --out"
                )
        yield PlannedFolder(out, old, plan)


def _check_free(out: Path) -> None:
    """Refuses a folder that is finished or holds something else."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out} is prepared already: train with --data.path {out}, delete it, or choose another --out")
    if (out / PLAN).exists():
        _read_plan(out)
    elif out.exists() and (not out.is_dir() or any(not path.name.endswith(".partial") for path in out.iterdir())):
        raise UserError(f"{out} already holds something: choose another --out")


def _read_plan(out: Path) -> dict[str, Any]:
    plan = None
    with contextlib.suppress(OSError, ValueError):  # then it is not ours
        plan = read_json(out / PLAN)
    if not isinstance(plan, dict) or plan.get("format") != FORMAT or not _are_files(plan.get("files")):
        raise UserError(f"{out} already holds something: choose another --out")
    return plan


def _are_files(files: Any) -> bool:
    return isinstance(files, list) and all(isinstance(file, list) and len(file) == 3 for file in files)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Locks a folder, so that no other process works in it. The lock ends with the process, however that ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {out}: wait for it, or choose another --out") from None
        yield
    finally:
        os.close(folder)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a file of the folder, all of it or nothing."""
    with staged(file, FULL, ELSEWHERE) as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


class _Start(NamedTuple):
    """Where a shard begins."""

    piece: Place
    skip: int
    """How many tokens of the piece are in the shard before."""
    texts: str
    """Of the `TextChain` of the file's pieces, up to this one."""


class Line(NamedTuple):
    """A line of the journal."""

    text: str
    entry: dict[str, Any]
    """Of the shard in the manifest."""
    next: _Start


def read_journal(out: Path) -> list[Line]:
    """The lines of the journal before the first that is damaged or cut off."""
    try:
        raws = read_regular(out / JOURNAL).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    lines = []
    for i, raw in enumerate(raws):
        try:
            content = parse_json(raw.decode())
            entry, (*place, skip, texts) = content["shard"], content["next"]
            start = _Start(Place(*map(operator.index, place)), operator.index(skip), str(texts))
            is_whole = entry["file"] == shard_name(i) and all(type(entry[n]) is int for n in ("tokens", "documents"))
        except (ValueError, KeyError, TypeError):
            break
        if not is_whole:
            break
        lines.append(Line(raw.decode(), entry, start))
    return lines


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.bin"


class ShardWriter:
    """Cuts a sequence of tokens into files, and goes on after those that the journal lists."""

    def __init__(self, out: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self._out, self._dtype, self._most = out, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = []
        """Of the manifest, for each finished shard."""
        self.next = _Start(FIRST, 0, TextChain().sha256)
        lines = []
        for line in read_journal(out):
            file = out / line.entry["file"]
            if not file.is_file() or file.stat().st_size != line.entry["tokens"] * dtype.itemsize:
                break
            lines.append(line)
            self.entries.append(line.entry)
            self.next = line.next
        with staged(out / JOURNAL, FULL, ELSEWHERE) as path:
            path.write_text("".join(f"{line.text}\n" for line in lines), encoding="utf-8")
        for file in set(out.glob("shard-*.bin")) - {out / entry["file"] for entry in self.entries}:
            file.unlink()  # the journal does not know it: it is written again, if there is so much to write
        self.total = sum(entry["tokens"] for entry in self.entries)
        self._skip = self.next.skip
        self._source, self._texts = self.next.piece.source, TextChain(self.next.texts)
        self._file: BinaryIO | None = None

    @property
    def _partial(self) -> Path:
        return self._out / ".shard.partial"

    def add(self, piece: Piece, tokens: np.ndarray) -> None:
        """Appends the tokens of the next piece."""
        if piece.place.source != self._source:
            self._source, self._texts = piece.place.source, TextChain()
        if not self._skip:  # else the shard before has its first tokens, and the chain its text
            self._texts.add(piece.text, piece.is_last)
        at, self._skip = self._skip, 0
        while at < len(tokens):
            with _writing(self._out):
                if self._file is None:
                    self._file, self._sha256 = self._partial.open("wb"), hashlib.sha256()
                    self._tokens, self._documents, self._first = 0, 0, piece.place.source
                taken = tokens[at : at + self._most - self._tokens]
                content = taken.tobytes()
                self._sha256.update(content)
                self._file.write(content)
            at, self._last = at + len(taken), piece.place.source
            self._tokens, self.total = self._tokens + len(taken), self.total + len(taken)
            self._documents += piece.is_last and at == len(tokens)
            if self._tokens == self._most:
                self.finish(piece.place, at)

    def finish(self, place: Place, skip: int) -> None:
        """Ends the shard, if one is begun; the next one begins with a piece, without its first `skip` tokens."""
        if self._file is None:
            return
        name = shard_name(len(self.entries))
        entry = {
            "file": name,
            "tokens": self._tokens,
            "documents": self._documents,
            "sha256": self._sha256.hexdigest(),
            "sources": [self._first, self._last],
        }
        with _writing(self._out):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._out / name)
            with (self._out / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps({"shard": entry, "next": [*place, skip, self._texts.sha256]}) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        self._file = None
        self.entries.append(entry)

    def close(self) -> None:
        """Drops a shard that is not finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written is not needed either
                self._file.close()
            self._partial.unlink(missing_ok=True)
            self._file = None


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(out, error, FULL, ELSEWHERE) from None
