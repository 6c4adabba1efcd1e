"""From a text or transcripts to batches: read, tokenize, split, and choose windows purely by (seed, step)."""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import sources, transcripts
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, TranscriptTokenizer
from jaxlm.errors import UserError

BLOCK_CHARS = 1 << 24
"""Texts are read and tokenized this many characters at a time."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized data, of the smallest unsigned type that holds V.

    The splits of a text are streams [n], in memory or mapped; those of transcripts are rows [R, T + 1], in memory.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    sha256: str
    """Of the text; of transcripts as `transcripts.identity` says."""


def load_corpus(cfg: DataConfig, tokenizer: Tokenizer | None = None, seq_len: int | None = None) -> Corpus:
    """Reads the data of a dataset or path, makes the tokenizer unless one is given, and tokenizes both splits.

    A text's split is by characters: the first 1 - val_fraction train. A character vocabulary is that of the whole
    text; BPE merges are learned from the training split alone. Texts of more than `resident_mb` MiB go through
    a token file in the data cache, made once and memory-mapped. Transcripts are split by utterances, and each is cut
    into rows on its own.

    Args:
      seq_len: T, targets of a row of transcripts; a text needs none.

    Raises:
      UserError: data that are missing, empty or not UTF-8 (with the byte offset), characters outside a transcript's
        vocabulary (with file and row), an unknown dataset, or one that the tokenizer is not for.
    """
    if not cfg.path:
        kind = sources.kind(cfg.dataset)
        if (kind == "transcripts") != (cfg.tokenizer == "transcript"):
            fix = "transcript" if kind == "transcripts" else "char or bpe"
            raise UserError(
                f"dataset {cfg.dataset!r} is {'a text' if kind == 'text' else kind}, which tokenizer = "
                f"{cfg.tokenizer!r} does not read: use --data.tokenizer {fix}, or another --data.dataset or --data.path"
            )
    if cfg.tokenizer == "transcript":
        return _load_transcripts(cfg, seq_len)
    path = Path(cfg.path) if cfg.path else sources.fetch(cfg.dataset).train[0]
    if not path.is_file():
        raise UserError(f"corpus {path} is not a file: give an existing UTF-8 text by --data.path")
    characters = sum(len(block) for block in _blocks(path))
    if characters == 0:
        raise UserError(f"corpus {path} is empty: give a text")
    boundary = int((1 - cfg.val_fraction) * characters)
    if tokenizer is None:
        if cfg.tokenizer == "char":
            tokenizer = CharTokenizer(frozenset().union(*map(frozenset, _blocks(path))))
        else:
            tokenizer = BPETokenizer.train(_blocks(path, 0, boundary), cfg.bpe_vocab_size)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    spans = (0, boundary), (boundary, None)
    if path.stat().st_size <= cfg.resident_mb << 20:
        dtype = token_dtype(tokenizer.vocab_size)
        train, val = (
            np.concatenate([np.empty(0, dtype), *(tokenizer.encode(b).astype(dtype) for b in _blocks(path, *span))])
            for span in spans
        )
    else:
        train, val = (_token_file(path, sha256, tokenizer, span) for span in spans)
    return Corpus(tokenizer, train, val, sha256)


class Transcripts(NamedTuple):
    """Both splits as utterances, uncut and without their frame."""

    train: list[transcripts.Utterance]
    val: list[transcripts.Utterance]
    sha256: str
    """As `transcripts.identity` says."""


def read_transcripts(cfg: DataConfig) -> Transcripts:
    """Reads both splits of transcripts.

    Raises:
      UserError: as `load_corpus`.
    """
    if cfg.path:
        train_files = transcripts.find_files(Path(cfg.path))
        val_files = transcripts.find_files(Path(cfg.val_path)) if cfg.val_path else ()
    else:
        train_files, val_files = sources.fetch(cfg.dataset)
    train, val = (transcripts.read(files, TranscriptTokenizer()) for files in (train_files, val_files))
    if not val_files:
        boundary = int((1 - cfg.val_fraction) * len(train))
        train, val = train[:boundary], train[boundary:]
    return Transcripts(train, val, transcripts.identity(train_files, val_files))


def _load_transcripts(cfg: DataConfig, seq_len: int | None) -> Corpus:
    if seq_len is None:
        raise UserError("seq_len = None: transcripts are cut into rows, give the targets of one")
    read, tokenizer = read_transcripts(cfg), TranscriptTokenizer()
    train_rows, val_rows = (transcripts.cut(split, tokenizer, seq_len) for split in (read.train, read.val))
    return Corpus(tokenizer, train_rows, val_rows, read.sha256)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids 0 .. V - 1."""
    return np.min_scalar_type(vocab_size - 1)


def _blocks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Characters start to stop of a UTF-8 file, at most BLOCK_CHARS at a time; newlines are kept as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, offset = 0, 0  # characters and bytes consumed before the current read
    with path.open("rb") as file:
        while stop is None or place < stop:
            raw = file.read(BLOCK_CHARS)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                byte = error.object[error.start]
                raise UserError(
                    f"corpus {path} is not UTF-8: byte 0x{byte:02x} at offset {at}; convert it to UTF-8 first"
                ) from None
            end = len(text) if stop is None else stop - place
            if piece := text[max(start - place, 0) : end]:
                yield piece
            place, offset = place + len(text), offset + len(raw)
            if not raw:
                return


def _token_file(path: Path, sha256: str, tokenizer: Tokenizer, span: tuple[int, int | None]) -> np.ndarray:
    """The memory-mapped tokens of a part of a text; the file is made on the first call."""
    identity = hashlib.sha256(json.dumps([sha256, tokenizer.to_dict(), span]).encode()).hexdigest()
    target = sources.data_dir() / "tokens" / f"{path.stem}-{identity[:16]}.bin"
    dtype = token_dtype(tokenizer.vocab_size)
    if not target.exists():
        aside = target.with_suffix(f".{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                for block in _blocks(path, *span):
                    tokenizer.encode(block).astype(dtype).tofile(file)
            aside.replace(target)
        except OSError as error:
            raise UserError(f"token file {target} cannot be written ({error.strerror}): set JAXLM_DATA_DIR") from None
    return np.memmap(target, dtype, mode="r") if target.stat().st_size else np.empty(0, dtype)


def check_lengths(corpus: Corpus, seq_len: int) -> None:
    """Refuses splits too short to train on or to evaluate.

    Raises:
      UserError: fewer than seq_len + 1 training tokens, or fewer than 2 validation tokens; a split of transcripts
        without a row.
    """
    if corpus.train.ndim == 2:
        for name, rows in (("training", corpus.train), ("validation", corpus.val)):
            if not len(rows):
                raise UserError(
                    f"the {name} split has no row: give more transcripts, "
                    "another --data.val-fraction, or --data.val-path"
                )
        return
    if len(corpus.train) <= seq_len:
        raise UserError(
            f"the training split has {len(corpus.train)} tokens, shorter than one context of max_seq_len = {seq_len} "
            "and its next token: give more text, or a smaller --model.max-seq-len"
        )
    if len(corpus.val) < 2:
        raise UserError(
            f"the validation split has {len(corpus.val)} tokens, too few for one target: "
            "give more text, or a larger --data.val-fraction"
        )
    if len(corpus.train) > np.iinfo(np.int32).max:
        raise UserError(f"the training split has {len(corpus.train)} tokens: at most 2^31 - 1 can be addressed")
