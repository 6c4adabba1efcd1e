"""The documents of .txt, .jsonl and .parquet files, read piece by piece from any place, so that memory is bounded.

The first two may be compressed (`compressed.SUFFIXES`).
"""

import codecs
import functools
import glob
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data.compressed import num_bytes, opened, plain_suffix
from jaxlm.data.files import decode_utf8, not_utf8
from jaxlm.data.reading import TOO_DEEP, check_depth
from jaxlm.errors import UserError

PIECE = 1 << 18
"""Characters of a piece: a longer document is cut between two words, if the tokenizer allows it."""

DOCUMENT_LIMIT = 1 << 26
"""Characters of the longest piece, and bytes of the longest line of a .jsonl file."""

READ = 1 << 18
"""Bytes that are read from a text at once."""

ROWS = 256
"""Rows of a .parquet file that are read at once."""


class Source(NamedTuple):
    """A file of documents."""

    name: str
    """Its path from the folder that all files share, with / between the parts."""
    path: Path
    bytes: int
    extent: int
    """Where its documents end: bytes (of what a compressed file holds), or rows of a .parquet file."""

    @property
    def kind(self) -> str:
        """.txt, .jsonl or .parquet; what has another name is text."""
        kind = plain_suffix(self.path)
        return kind if kind in READERS else ".txt"

    def bytes_before(self, place: "Place") -> int:
        """About how many bytes of the file a place has before it."""
        in_document = 0 if self.kind == ".parquet" else place.part * PIECE
        return min(self.bytes * place.offset // max(self.extent, 1) + in_document, self.bytes)


class Place(NamedTuple):
    """Where a piece begins."""

    source: int
    """Number of the file."""
    offset: int
    """Byte of the file (or row of a .parquet file) where the document begins."""
    part: int
    """Number of the piece in its document."""


FIRST = Place(0, 0, 0)


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    place: Place
    text: str
    is_last: bool
    """Whether the document ends here."""


Document = tuple[int, Iterator[str]]
"""Where a document begins, and its text in blocks of any size. The blocks are read before the next document."""


def find_sources(cfg: PrepareConfig, any_name: bool = False) -> list[Source]:
    """The files that a path names, in the order of their names; fetches nothing and reads no document.

    Links are followed, and each file counts once, under the first of its names.

    Args:
      any_name: the path may also lead to a file of another name, which is read as text.

    Raises:
      UserError: there are none, one is not a regular file or cannot be read, or a .parquet file has no such column of
        text.
    """
    path = Path(cfg.path)
    if path.is_dir():
        names = [name for name in _walk(path) if plain_suffix(name) in READERS]
        found = "no .txt, .jsonl or .parquet file is in it"
    elif path.exists():
        names, found = [path], ""
        if plain_suffix(path) not in READERS and not any_name:
            raise UserError(f"{path} is not a .txt, .jsonl or .parquet file: rename it, or name another by --data.path")
    else:
        names = [Path(name) for name in glob.glob(cfg.path, recursive=True) if plain_suffix(Path(name)) in READERS]
        found = "there is no such file or folder, and the pattern names no .txt, .jsonl or .parquet file"
    if not names:
        raise UserError(f"corpus {path}: {found}; name files of documents by --data.path")
    root = path if path.is_dir() else Path(os.path.commonpath([name.parent for name in names]))
    sources, seen = [], set()
    for name in sorted(names, key=lambda name: name.relative_to(root).parts):
        if (real := os.path.realpath(name)) in seen:
            continue
        seen.add(real)
        try:
            if not stat.S_ISREG(name.stat().st_mode):  # opening a pipe would wait for whoever writes it
                raise UserError(f"{name} is not a regular file: leave it out, or write its text to a file")
            with name.open("rb"):
                size = name.stat().st_size
            is_table = plain_suffix(name) == ".parquet"
            extent = _parquet(name, cfg).metadata.num_rows if is_table else num_bytes(name)
        except OSError as error:
            raise unreadable(name, error) from None
        sources.append(Source(name.relative_to(root).as_posix(), name, size, extent))
    return sources


def _walk(root: Path) -> Iterator[Path]:
    """The files of a folder, at any depth. Each folder is read once, however many links lead to it."""
    seen = set()
    for folder, folders, files in os.walk(root, onerror=_refuse_unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(folder, name) for name in files)


def read_pieces(sources: list[Source], cfg: PrepareConfig, may_cut: bool, start: Place = FIRST) -> Iterator[Piece]:
    """All documents from a place on, in order. Documents without a character are left out.

    Args:
      may_cut: whether a piece may end where a space or a line feed follows another character (`cuts_at_spaces`).
      start: the place of a piece that an earlier call with the same arguments yielded.

    Raises:
      UserError: a file that cannot be read or is not UTF-8 (with the byte), a line that is not a JSON object with the
        field (with the line), a row without text, or a document too long for one piece. The message names the file.
    """
    for number in range(start.source, len(sources)):
        source, offset = sources[number], start.offset if number == start.source else 0
        try:
            for begin, blocks in READERS[source.kind](source, cfg, offset):
                wanted = start.part if (number, begin) == start[:2] else 0
                for part, (text, is_last) in enumerate(_cut(blocks, may_cut, source, begin)):
                    if part >= wanted and text:
                        yield Piece(Place(number, begin, part), text, is_last)
        except OSError as error:
            raise unreadable(source.path, error) from None


def _cut(blocks: Iterator[str], may_cut: bool, source: Source, begin: int) -> Iterator[tuple[str, bool]]:
    """A document in pieces: whole, or cut where a new word begins. The last one may only be empty if all is."""
    text = ""
    for block in blocks:
        text += block
        while may_cut and len(text) > 2 * PIECE and (end := _word_end(text, PIECE)):
            yield text[:end], False
            text = text[end:]
        if len(text) > DOCUMENT_LIMIT:
            what = "without a space" if may_cut else "which this tokenizer reads at once"
            raise UserError(
                f"{source.path}: the document at {_unit(source)} {begin} has more than {DOCUMENT_LIMIT:,} characters "
                f"{what}: cut it into documents, for a .txt file by --separator"
            )
    yield text, True


def _word_end(text: str, first: int) -> int:
    """The first place from `first` on where a space or a line feed follows another character; 0 = none."""
    places = [place for mark in " \n" if (place := _mark(text, mark, first)) > 0]
    return min(places, default=0)


def _mark(text: str, mark: str, first: int) -> int:
    place = text.find(mark, first)
    while place > 0 and text[place - 1].isspace():
        place = text.find(mark, place + 1)
    return place


def _unit(source: Source) -> str:
    return "row" if source.kind == ".parquet" else "byte"


def _skip_to(file: io.BufferedIOBase, offset: int) -> int:
    """Moves to a place of a text, and past a byte-order mark at its beginning, which is no text."""
    if offset == 0 and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        return len(codecs.BOM_UTF8)
    return file.seek(offset)


def _text_documents(source: Source, cfg: PrepareConfig, offset: int) -> Iterator[Document]:
    """The documents of a .txt file: all of it, or what stands between lines that are the separator."""
    separator = None if cfg.separator is None else cfg.separator.encode()
    with opened(source.path) as file:
        offset = _skip_to(file, offset)
        read: Callable[[], bytes] = functools.partial(file.read, READ)
        if separator is not None:  # a part of a longer line must not look like it
            read = functools.partial(file.readline, max(READ, len(separator) + 3))
        at_end = False

        def document() -> Iterator[str]:
            nonlocal offset, at_end
            decoder, starts_line = codecs.getincrementaldecoder("utf-8")(), True
            while True:
                raw = read()
                at_end = not raw
                is_separator = starts_line and separator is not None and raw.rstrip(b"\r\n") == separator
                pending = len(decoder.getstate()[0])
                ends = at_end or is_separator
                try:
                    text = decoder.decode(b"" if ends else raw, final=ends)
                except UnicodeDecodeError as error:
                    where = offset - pending + error.start
                    raise not_utf8(str(source.path), error.object[error.start], where) from None
                offset += len(raw)
                if ends:
                    return
                starts_line = raw.endswith(b"\n")
                yield text

        while not at_end:
            yield offset, document()


def _json_documents(source: Source, cfg: PrepareConfig, offset: int) -> Iterator[Document]:
    """The documents of a .jsonl file: a field of the object of each line that is not blank."""
    with opened(source.path) as file:
        offset = _skip_to(file, offset)
        while raw := file.readline(DOCUMENT_LIMIT):
            if not raw.isspace():
                yield offset, iter([_json_text(raw, source.path, cfg, offset)])
            offset += len(raw)


def _json_text(raw: bytes, path: Path, cfg: PrepareConfig, offset: int) -> str:
    field = cfg.field

    def refusal(what: str, fix: str) -> UserError:
        lines = 1
        with opened(path) as file:
            while left := offset - file.tell():
                lines += file.read(min(left, READ)).count(b"\n")
        return UserError(f"{path}, line {lines} {what}: {fix}")

    try:
        value = json.loads(raw.decode())  # `parse_json` takes several times as long
        check_depth(value)
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), raw[error.start], offset + error.start) from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        if isinstance(error, RecursionError):
            reason = TOO_DEEP
        if len(raw) == DOCUMENT_LIMIT:
            reason = f"it has more than {DOCUMENT_LIMIT:,} bytes"
        raise refusal(f"is not JSON ({reason})", "correct or remove it") from None
    if not isinstance(value, dict) or field not in value:
        has = f"has no field {field!r}" if isinstance(value, dict) else "is not a JSON object"
        fix = f"name one of {', '.join(value)} by {cfg.option}" if isinstance(value, dict) and value else "remove it"
        raise refusal(has, fix)
    text = value[field]
    if not isinstance(text, str):
        raise refusal(f"has {field} = {json.dumps(text)[:40]}", f"give a text there, or name another by {cfg.option}")
    if b"\\u" in raw and any("\ud800" <= character <= "\udfff" for character in text):
        raise refusal(f"has half a surrogate pair in {field}", "correct or remove it")
    return text


def _parquet_documents(source: Source, cfg: PrepareConfig, offset: int) -> Iterator[Document]:
    """The documents of a .parquet file: a column of each row."""
    file, row = _parquet(source.path, cfg), 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows <= offset:
            row += rows
            continue
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[cfg.field]):
            for text in batch.column(0):
                if row >= offset:
                    if not text.is_valid:
                        raise UserError(f"{source.path}, row {row} has no {cfg.field}: remove it")
                    content = text.as_buffer().to_pybytes()
                    yield row, iter([decode_utf8(content, f"{source.path}, row {row}")])
                row += 1


def _parquet(path: Path, cfg: PrepareConfig) -> Any:
    """An open .parquet file that has the column of text."""
    field = cfg.field
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow, which is not installed: install jaxlm[data], or give .jsonl files"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a .parquet file ({' '.join(str(error).split())}): remove it") from None
    schema = file.schema_arrow
    if field not in schema.names:
        raise UserError(f"{path} has no column {field!r}: name one of {', '.join(schema.names)} by {cfg.option}")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {field!r} is of type {kind}: name a column of text by {cfg.option}")
    return file


READERS: dict[str, Callable[[Source, PrepareConfig, int], Iterator[Document]]] = {
    ".txt": _text_documents,
    ".jsonl": _json_documents,
    ".parquet": _parquet_documents,
}


def _refuse_unreadable(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from None


def unreadable(path: Path, error: OSError) -> UserError:
    """The refusal of a file."""
    return UserError(f"{path} cannot be read ({error.strerror or error}): make it readable, or leave it out")
