"""From documents to token shards on disk; work that was interrupted goes on where it was."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.bpe import END_OF_TEXT, BPETokenizer
from jaxlm.data.document_tokens import cuts_at_spaces, special_ids
from jaxlm.data.document_workers import tokenized
from jaxlm.data.documents import Place, Source, find_sources, read_pieces
from jaxlm.data.prepare_folder import JOURNAL, PlannedFolder, ShardWriter, TextChain, begun, read_journal, write_json
from jaxlm.data.shards import FORMAT, MANIFEST, PLAN, TOKENIZER
from jaxlm.errors import UserError

SAMPLE_CHARS = 1 << 26
"""A new tokenizer learns from about so many characters at most."""

SAMPLE_FILES = 1024
"""And from the beginnings of about so many files, evenly spread, where there are far more."""


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
    with begun(out, plan) as folder:
        return _work(cfg, folder, sources, tokenizer, end_of_text, workers or os.cpu_count() or 1, report)


def _work(
    cfg: PrepareConfig,
    folder: PlannedFolder,
    sources: list[Source],
    tokenizer: BPETokenizer | None,
    end_of_text: int | None,
    workers: int,
    report: Report,
) -> dict[str, Any]:
    """Writes what is missing in a folder that has its plan."""
    out = folder.path
    if folder.has_other_files:
        _take_changes(cfg, folder, sources)
    tokenizer, end_of_text = _tokenizer(folder, cfg, sources, tokenizer, end_of_text)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    shards = ShardWriter(out, dtype, cfg.shard_tokens)
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
    write_json(out / MANIFEST, manifest)
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


def _take_changes(cfg: PrepareConfig, folder: PlannedFolder, sources: list[Source]) -> None:
    """Goes on with other files than those of the plan, if what is finished is the same with them, and refuses if not.

    Of the files that are finished, sizes and times of change are compared; of the one under way the texts that were
    read; and the sample that the tokenizer learned from. All else may have changed: it was not read, or a line in it
    was refused.
    """
    journal = read_journal(folder.path)
    if not journal:
        (folder.path / TOKENIZER).unlink(missing_ok=True)
    else:
        (number, *_), _, texts = journal[-1].next
        before, after = folder.plan["files"], folder.new_plan["files"]
        is_same = before[:number] == after[:number] and [name for name, *_ in before[number : number + 1]] == [
            name for name, *_ in after[number : number + 1]
        ]
        stored = tokenizers.load(folder.path / TOKENIZER, folder.damaged)
        assert isinstance(stored, BPETokenizer)
        if is_same and number < len(before):
            is_same = texts == _texts_before(cfg, sources, journal[-1].next.piece, cuts_at_spaces(stored))
        if is_same and "tokenizer" not in folder.plan:  # it was learned
            chain = TextChain()
            for text in _sample(sources, cfg):
                chain.add(text)
            is_same = chain.sha256 == folder.plan.get("sample")
        if not is_same:
            raise UserError(
                f"{folder.path} was begun with other files, or they have changed since, in what is finished: choose "
                f"another --out, or delete {folder.path}"
            )
    folder.save(files=folder.new_plan["files"])


def _texts_before(cfg: PrepareConfig, sources: list[Source], last: Place, may_cut: bool) -> str:
    """The sha256 of a chain of texts: those of a file from its first to the one at a place."""
    chain = TextChain()
    for piece in read_pieces(sources, cfg, may_cut, Place(last.source, 0, 0)):
        if piece.place > last:
            break
        chain.add(piece.text, piece.is_last)
    return chain.sha256


def _tokenizer(
    folder: PlannedFolder,
    cfg: PrepareConfig,
    sources: list[Source],
    tokenizer: BPETokenizer | None,
    end_of_text: int | None,
) -> tuple[BPETokenizer, int]:
    """The tokenizer of the folder, which the first call learns or takes over, and its end-of-text token."""
    file = folder.path / TOKENIZER
    if not file.exists():
        if tokenizer is None:
            chain = TextChain()
            tokenizer = BPETokenizer.train_on_documents(chain.through(_sample(sources, cfg)), cfg.bpe_vocab_size)
            folder.save(sample=chain.sha256)
        write_json(file, tokenizer.to_dict())
    stored = tokenizers.load(file, folder.damaged)
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
