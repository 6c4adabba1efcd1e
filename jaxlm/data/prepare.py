"""From documents to token shards on disk; work that was interrupted goes on where it was."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.bpe import END_OF_TEXT, BPETokenizer
from jaxlm.data.document_tokens import cuts_at_spaces, special_ids
from jaxlm.data.document_workers import tokenized
from jaxlm.data.documents import FIRST, Piece, Place, Source, find_sources, read_pieces
from jaxlm.data.files import staged
from jaxlm.data.shards import FORMAT, MANIFEST, PLAN, TOKENIZER
from jaxlm.errors import UserError

SAMPLE_CHARS = 1 << 26
"""A new tokenizer learns from about so many characters at most."""

SAMPLE_FILES = 1024
"""And from the beginnings of about so many files, evenly spread, where there are far more."""

JOURNAL = "progress.jsonl"
"""A line for each finished shard: its entry of the manifest, and the place where the next one begins."""

FULL = "free some space, and give the same command again: what is finished is kept"


class Progress(NamedTuple):
    """How far the work is."""

    bytes: int
    total_bytes: int
    tokens: int
    shards: int
    """Finished ones."""


Report = Callable[[Progress], None]


def prepare_corpus(
    cfg: PrepareConfig,
    out: Path,
    tokenizer: BPETokenizer | None = None,
    end_of_text: int | None = None,
    workers: int | None = None,
    report: Report = lambda progress: None,
) -> dict[str, Any]:
    """Writes the token shards of a corpus, and goes on with what an interrupted call has left in `out`.

    The files are read in the order of their names. Each document is followed by the end-of-text token. The shards cut
    the whole sequence every `shard_tokens` tokens. The result is the same to the byte, however many workers there are
    and however often it was interrupted.

    A new BPE tokenizer learns from the documents at the beginning of each file, SAMPLE_CHARS characters in all, and
    from none that begins in the last `val_fraction` of the bytes. Of more than twice SAMPLE_FILES files it reads about
    that many, evenly spread.

    Args:
      tokenizer: an existing one, with the id of its end-of-text token; None = learn one.
      workers: processes that tokenize; None = one for each core. One = this process.
      report: called as the work goes on.

    Returns:
      The manifest (docs/data.md).

    Raises:
      UserError: bad input (`find_sources`, `read_pieces`), a corpus of fewer than two documents, other options than
        those `out` was begun with, an `out` that holds something else, or a disk that is full.
      CheckError: a worker process was killed.
    """
    sources = find_sources(cfg)
    _check_documents(sources, cfg)
    if tokenizer is not None and end_of_text not in (ids := sorted(special_ids(tokenizer).values())):
        known = ", ".join(map(str, ids))
        raise UserError(f"end_of_text = {end_of_text} is no special token of the tokenizer: give one of {known}")
    plan = _plan(cfg, sources, tokenizer, end_of_text)
    _begin(out, plan)
    with _alone(out):
        return _work(cfg, out, sources, tokenizer, end_of_text, workers or os.cpu_count() or 1, report)


def _work(
    cfg: PrepareConfig,
    out: Path,
    sources: list[Source],
    tokenizer: BPETokenizer | None,
    end_of_text: int | None,
    workers: int,
    report: Report,
) -> dict[str, Any]:
    """Writes what is missing in a folder that has its plan."""
    tokenizer, end_of_text = _tokenizer(out, cfg, sources, tokenizer, end_of_text)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    shards = _Shards(out, dtype, cfg.shard_tokens, len(sources))
    pieces = read_pieces(sources, cfg, cuts_at_spaces(tokenizer), shards.next.piece)
    before = [0]
    for source in sources:
        before.append(before[-1] + source.bytes)
    with contextlib.closing(shards), contextlib.closing(tokenized(pieces, tokenizer, end_of_text, workers)) as results:
        for piece, tokens in results:
            shards.add(piece, tokens.astype(dtype))
            done = before[piece.place.source] + sources[piece.place.source].bytes_before(piece.place)
            report(Progress(done, before[-1], shards.total, len(shards.entries)))
        shards.finish(Place(len(sources), 0, 0), 0)
    report(Progress(before[-1], before[-1], shards.total, len(shards.entries)))
    manifest = {
        "format": FORMAT,
        "tokenizer_sha256": hashlib.sha256((out / TOKENIZER).read_bytes()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": end_of_text,
        "dtype": dtype.name,
        "documents": sum(entry["documents"] for entry in shards.entries),
        "tokens": shards.total,
        "sources": [{"file": source.name, "bytes": source.bytes} for source in sources],
        "shards": shards.entries,
    }
    _write_json(out / MANIFEST, manifest)
    for file in (out / PLAN, out / JOURNAL, *out.glob(".*.partial")):
        file.unlink()
    return manifest


def _check_documents(sources: list[Source], cfg: PrepareConfig) -> None:
    """Refuses a corpus that cannot be split by documents, before anything is written."""
    pieces = read_pieces(sources, cfg, may_cut=True)
    if (first := next(pieces, None)) is None:
        raise UserError(f"corpus {cfg.path} holds no text: give files with documents")
    if all(piece.place[:2] == first.place[:2] for piece in pieces):
        raise UserError(
            f"corpus {cfg.path} is one document, and training and validation share none: give more files, or cut a "
            ".txt file by --separator ('' = at empty lines)"
        )


def _plan(
    cfg: PrepareConfig, sources: list[Source], tokenizer: BPETokenizer | None, end_of_text: int | None
) -> dict[str, Any]:
    """All that decides the result, as JSON types."""
    plan = dataclasses.asdict(cfg) | {"path": str(Path(cfg.path).absolute())}
    if tokenizer is not None:
        del plan["bpe_vocab_size"], plan["val_fraction"]
        plan["tokenizer"] = hashlib.sha256(json.dumps([tokenizer.to_dict(), end_of_text]).encode()).hexdigest()
    files = [[source.name, source.bytes, source.path.stat().st_mtime_ns] for source in sources]
    return {"format": FORMAT, **plan, "files": files}


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Writes the plan into a new folder, or compares it with the one that is there."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out} is prepared already: train with --data.path {out}, or choose another --out")
    if not (out / PLAN).exists():
        if out.exists() and (not out.is_dir() or any(not path.name.endswith(".partial") for path in out.iterdir())):
            raise UserError(f"{out} already holds something: choose another --out")
        _write_json(out / PLAN, plan)
        return
    begun = json.loads((out / PLAN).read_text(encoding="utf-8"))
    if begun["files"] != plan["files"]:
        raise UserError(f"{out} was begun with other files, or they have changed since: choose another --out")
    for name in sorted(begun.keys() | plan.keys()):
        if begun.get(name) != plan.get(name):
            raise UserError(
                f"{out} was begun with {name} = {begun.get(name)!r}, not {plan.get(name)!r}: give the same options "
                "to go on, or choose another --out"
            )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Locks a folder, so that no other process works in it. The lock ends with the process, however that ends."""
    with (out / PLAN).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {out}: wait for it, or choose another --out") from None
        yield


def _tokenizer(
    out: Path, cfg: PrepareConfig, sources: list[Source], tokenizer: BPETokenizer | None, end_of_text: int | None
) -> tuple[BPETokenizer, int]:
    """The tokenizer of the folder, which the first call learns or takes over, and its end-of-text token."""
    if not (out / TOKENIZER).exists():
        kept = tokenizer or BPETokenizer.train_on_documents(_sample(sources, cfg), cfg.bpe_vocab_size)
        _write_json(out / TOKENIZER, kept.to_dict())
    stored = tokenizers.load(out / TOKENIZER)
    assert isinstance(stored, BPETokenizer)
    return stored, special_ids(stored)[END_OF_TEXT] if end_of_text is None else end_of_text


def _sample(sources: list[Source], cfg: PrepareConfig) -> Iterator[str]:
    """The texts that a tokenizer is learned from, of documents that begin in the share for training."""
    left = int((1 - cfg.val_fraction) * sum(source.bytes for source in sources))
    shares: list[tuple[int, float]] = []  # the number of a file, and the share of it that may be read
    for number, source in enumerate(sources):
        if source.bytes and left > 0:
            shares.append((number, min(left / source.bytes, 1)))
            left -= source.bytes
    chosen = shares[:: max(len(shares) // SAMPLE_FILES, 1)]
    for number, share in chosen:
        characters = 0
        for piece in read_pieces([sources[number]], cfg, may_cut=True):
            if piece.place.offset > share * sources[number].extent or characters * len(chosen) >= SAMPLE_CHARS:
                break
            yield piece.text
            characters += len(piece.text)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with staged(file, FULL) as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


class _Start(NamedTuple):
    """Where a shard begins: a piece, and how many of its tokens are in the shard before."""

    piece: Place
    skip: int


class _Shards:
    """Cuts a sequence of tokens into files, and goes on after those that the journal lists."""

    def __init__(self, out: Path, dtype: np.dtype, shard_tokens: int, num_sources: int) -> None:
        self._out, self._dtype, self._most = out, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = []
        """Of the manifest, for each finished shard."""
        self.next = _Start(FIRST, 0)
        lines = []
        with contextlib.suppress(FileNotFoundError):
            lines = (out / JOURNAL).read_text(encoding="utf-8").split("\n")[:-1]  # behind the last is one cut off
        for line in lines:
            entry = json.loads(line)
            source, offset, part, skip = entry.pop("next")
            file = out / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["tokens"] * dtype.itemsize:
                break
            self.entries.append(entry)
            self.next = _Start(Place(source, offset, part), skip)
        kept = "".join(f"{line}\n" for line in lines[: len(self.entries)])
        with staged(out / JOURNAL, FULL) as path:
            path.write_text(kept, encoding="utf-8")
        self.total = sum(entry["tokens"] for entry in self.entries)
        self._skip = self.next.skip
        self._file: BinaryIO | None = None

    @property
    def _partial(self) -> Path:
        return self._out / ".shard.partial"

    def add(self, piece: Piece, tokens: np.ndarray) -> None:
        """Appends the tokens of the next piece."""
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
        name = f"shard-{len(self.entries):05d}.bin"
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
                journal.write(json.dumps({**entry, "next": [*place, skip]}) + "\n")
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
        raise UserError(f"{out} cannot be written ({error.strerror or error}): {FULL}") from None
