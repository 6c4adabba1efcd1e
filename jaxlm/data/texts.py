"""A text for training: one file or several, read in order as one sequence of characters, and known by a sha256."""

import codecs
import dataclasses
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxlm.config.data import STDIN, Paths, as_paths
from jaxlm.config.prepare import PrepareConfig
from jaxlm.data import sources
from jaxlm.data.compressed import opened
from jaxlm.data.documents import READERS, Source, find_sources, unreadable
from jaxlm.data.files import unwritable
from jaxlm.errors import UserError

BLOCK_CHARS = 1 << 20
"""Texts are read and tokenized this many characters at a time."""

MARK = "\ufeff"
"""A byte-order mark."""

Span = tuple[int, int | None]
"""A part of a text by characters: its first, and the one after its last; None = to the end."""


class _Files(PrepareConfig):
    """How the files of a text are read."""

    @property
    def option(self) -> str:
        """The option that sets `field`, for messages."""
        return "--data.field"


@dataclasses.dataclass(frozen=True)
class Text:
    """The documents of some files, one after another.

    Where a document (a file of text, a line of .jsonl, a row of .parquet) does not end with a line feed and another
    follows, a line feed is put between them. Nothing else is added, and newlines stay as they are.
    """

    name: str
    """What messages call it."""
    files: tuple[Source, ...]
    field: str
    sha256: str
    """Of a single file of text that of its bytes, decompressed. Else of a line for each file: its kind, the field that
    was read if it has fields, and its sha256."""
    marked: frozenset[int] = frozenset()
    """Numbers of the files that begin with a byte-order mark."""
    keep_marks: bool = False
    """Whether these marks are text, as they were for runs of earlier versions."""

    @property
    def stem(self) -> str:
        """A name for a file that is made of the text."""
        return self.files[0].path.stem

    @property
    def size(self) -> int:
        """About how many bytes the text has."""
        return sum(file.bytes if file.kind == ".parquet" else file.extent for file in self.files)

    def blocks(self, span: Span = (0, None)) -> Iterator[str]:
        """A part of the text, at most BLOCK_CHARS characters at a time.

        Raises:
          UserError: as `documents.read_pieces`.
        """
        start, stop = span
        place = 0
        for block in _of_size(self._joined(), BLOCK_CHARS):
            end = len(block) if stop is None else stop - place
            if piece := block[max(start - place, 0) : max(end, 0)]:
                yield piece
            place += len(block)
            if stop is not None and place >= stop:
                return

    def _joined(self) -> Iterator[str]:
        last = "\n"
        for number, source in enumerate(self.files):
            try:
                for _, document in READERS[source.kind](source, _Files(path=str(source.path), field=self.field), 0):
                    marks = [MARK] if self.keep_marks and number in self.marked else []
                    texts = filter(None, itertools.chain(marks, document))
                    if (first := next(texts, None)) is None:
                        continue
                    yield first if last == "\n" else "\n" + first
                    last = first[-1]
                    for text in texts:
                        yield text
                        last = text[-1]
            except OSError as error:
                raise unreadable(source.path, error) from None


def open_text(paths: Paths, field: str, keep_marks: bool = False) -> Text:
    """The text at some paths: files, folders and patterns as `find_sources` finds them, in the order given.

    All of it is read once, for its sha256.

    Args:
      field: as DataConfig.field.
      keep_marks: as Text.keep_marks.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    files: list[Source] = []
    for path in as_paths(paths):
        cfg = _Files(path=path, field=field)
        if not Path(path).exists() and not any(mark in path for mark in "*?["):
            raise missing(path)
        if Path(path).is_fifo():
            raise UserError(f"{path} is a pipe, which can be read once: give - for stdin, and lead the pipe there")
        files += find_sources(cfg, any_name=True)
    hashes, marked = [], set()
    for number, file in enumerate(files):
        try:
            hashes.append(_sha256(file))
            if file.kind == ".txt" and _is_marked(file.path):
                marked.add(number)
        except OSError as error:
            raise unreadable(file.path, error) from None
    if len(files) == 1 and files[0].kind == ".txt":
        sha256 = hashes[0]
    else:
        kinds = [file.kind if file.kind == ".txt" else f"{file.kind} {field}" for file in files]
        lines = "".join(f"{kind} {one}\n" for kind, one in zip(kinds, hashes, strict=True))
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return Text(", ".join(as_paths(paths)), tuple(files), field, sha256, frozenset(marked), keep_marks)


def missing(path: str) -> UserError:
    """The refusal of a path that leads nowhere."""
    return UserError(f"corpus {path} does not exist: give an existing UTF-8 text or prepared corpus by --data.path")


def with_stdin_kept(paths: Paths) -> Paths:
    """The paths, with a file in the data cache for stdin, which has been read into it. The sha256 is its name.

    Raises:
      UserError: stdin is closed, or the file cannot be written.
    """
    if STDIN not in as_paths(paths):
        return paths
    whole = tuple(str(_kept_stdin()) if path == STDIN else path for path in as_paths(paths))
    return whole[0] if len(whole) == 1 else whole


def _kept_stdin() -> Path:
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("data.path = '-' is stdin, which is closed: give a text by a pipe, or a file")
    folder, digest, partial = sources.data_dir() / "stdin", hashlib.sha256(), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(".partial", dir=folder)
        with os.fdopen(number, "wb") as file:
            while block := _read_stdin():
                digest.update(block)
                file.write(block)
        target = folder / f"{digest.hexdigest()}.txt"
        os.replace(partial, target)
    except OSError as error:
        raise unwritable(folder, error, "set JAXLM_DATA_DIR to a folder with more space") from None
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
    return target


def _read_stdin() -> bytes:
    """Some bytes; none at the end."""
    try:
        return sys.stdin.buffer.read(1 << 20)
    except OSError as error:
        raise UserError(f"stdin cannot be read ({error.strerror}): give a text by a pipe, or a file") from None


def _of_size(blocks: Iterable[str], size: int) -> Iterator[str]:
    """The same text in blocks of a size, so that what follows does not depend on how it was read."""
    text = ""
    for block in blocks:
        text += block
        whole = len(text) - len(text) % size
        for start in range(0, whole, size):
            yield text[start : start + size]
        text = text[whole:]
    if text:
        yield text


def _sha256(source: Source) -> str:
    """Of what a file holds, decompressed."""
    with opened(source.path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _is_marked(path: Path) -> bool:
    with opened(path) as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
