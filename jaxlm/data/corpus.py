"""From a text or transcripts to token splits: read, tokenize, split."""

import codecs
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.config.sampling import SpecialTokens
from jaxlm.data import sources, transcripts
from jaxlm.data.batches import PaddedRows, Split, TokenStream
from jaxlm.data.files import not_utf8, staged
from jaxlm.data.shards import PreparedCorpus, is_prepared, open_prepared
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer, IdTokenizer, Tokenizer, TranscriptTokenizer
from jaxlm.errors import UserError

BLOCK_CHARS = 1 << 24
"""Texts are read and tokenized this many characters at a time."""

Span = tuple[int, int | None]
"""A part of a text by characters: its first, and the one after its last; None = to the end."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized data: streams for a text, padded rows for transcripts. Tokens have the smallest unsigned type."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    sha256: str
    """Identifies the data, as `identity` says."""

    def check_lengths(self) -> None:
        """Refuses splits too short to train on or to evaluate.

        Raises:
          UserError: the message names the split and its length.
        """
        self.train.check_training()
        self.val.check_evaluation()


def load_corpus(cfg: DataConfig, seq_len: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads the data of a dataset or path, builds the tokenizer unless one is given, and tokenizes both splits.

    A text is split by characters: the first 1 - val_fraction are for training. A character vocabulary is that of the
    whole text; BPE merges are learned from the training split alone. Each split is encoded as one text: what an
    imported tokenizer puts in front of a text or behind it stands there once. Texts of more than `resident_mb` MiB go
    through a memory-mapped token file in the data cache, written once. Transcripts are split by utterances, and each
    utterance is cut into rows of its own. A folder that `jaxlm prepare` wrote has its own tokenizer, its shards are
    memory-mapped, and it is split by documents: the first floor((1 - val_fraction) * documents) are for training.

    Args:
      seq_len: T, the targets of a training window or row.

    Raises:
      UserError: data that are missing, empty or not UTF-8 (with the byte offset), characters outside the vocabulary
        (with the place), an unknown dataset, or a tokenizer that does not suit the dataset.
      CheckError: a file of a prepared corpus is missing or damaged.
    """
    if (prepared := _prepared(cfg, tokenizer)) is not None:
        boundary, stop = prepared.boundary(cfg.val_fraction), len(prepared.tokens)
        parts = prepared.tokens.part(0, boundary), prepared.tokens.part(boundary, stop)
        train, val = (TokenStream(part, seq_len, prepared.end_of_text) for part in parts)
        return Corpus(prepared.tokenizer, train, val, prepared.sha256)
    if cfg.pack == "documents":
        if cfg.path is not None and not Path(cfg.path).exists():
            raise _missing(cfg.path)
        raise UserError(
            "data.pack = 'documents' needs documents: prepare them by jaxlm prepare, and give its folder by --data.path"
        )
    if cfg.tokenizer == "transcript":
        read = read_transcripts(cfg)
        return Corpus(TranscriptTokenizer(), _rows(read.train, seq_len), _rows(read.val, seq_len), read.sha256)
    path = _text_path(cfg)
    boundary = _boundary(cfg, path)
    if tokenizer is None:
        tokenizer = _learn_tokenizer(cfg, path, boundary)
    if isinstance(tokenizer, IdTokenizer):  # the boundary must not cut an id in two
        after = itertools.chain.from_iterable(_blocks(path, (boundary, None)))
        boundary += sum(1 for _ in itertools.takewhile(lambda character: not character.isspace(), after))
    text = _Text(path, _file_sha256(path), tokenizer, cfg.resident_mb, cfg.special_tokens)
    train, val = (TokenStream(text.tokens(span), seq_len) for span in ((0, boundary), (boundary, None)))
    return Corpus(tokenizer, train, val, text.sha256)


def _prepared(cfg: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedCorpus | None:
    """The prepared corpus at the path; None if the data are something else.

    Raises:
      UserError: a tokenizer is given, and is not the corpus' own.
    """
    if cfg.path is None or not is_prepared(Path(cfg.path)):
        return None
    corpus = open_prepared(Path(cfg.path))
    if tokenizer is not None and tokenizer.to_dict() != corpus.tokenizer.to_dict():
        raise UserError(
            f"{cfg.path} was prepared with another tokenizer than the model's: prepare the documents again with "
            "--tokenizer-from and the model's folder"
        )
    return corpus


def document_end(cfg: DataConfig, split: Split) -> int | None:
    """The token that attention does not look past with `pack` = "documents"; None = it sees the whole window."""
    return split.document_end if cfg.pack == "documents" and isinstance(split, TokenStream) else None


def with_own_tokenizer(cfg: DataConfig) -> DataConfig:
    """The config with the kind of tokenizer that a prepared corpus has, if its path leads to one."""
    is_own = cfg.path is not None and is_prepared(Path(cfg.path))
    return dataclasses.replace(cfg, tokenizer="bpe") if is_own else cfg


def learn_tokenizer(cfg: DataConfig) -> Tokenizer:
    """The tokenizer that `load_corpus` builds unless one is given.

    Raises:
      UserError: data that are missing, empty or not UTF-8, or an unknown dataset.
    """
    if (prepared := _prepared(cfg)) is not None:
        return prepared.tokenizer
    if cfg.tokenizer == "transcript":
        return TranscriptTokenizer()
    path = _text_path(cfg)
    return _learn_tokenizer(cfg, path, _boundary(cfg, path))


def load_unsplit(cfg: DataConfig, seq_len: int, tokenizer: Tokenizer) -> Split:
    """All of the data at `cfg.path` as one split, tokenized by a given tokenizer.

    Raises:
      UserError: as `load_corpus`.
    """
    if (prepared := _prepared(cfg, tokenizer)) is not None:
        return TokenStream(prepared.tokens, seq_len, prepared.end_of_text)
    if cfg.tokenizer == "transcript":
        read = read_transcripts(dataclasses.replace(cfg, val_path=None))
        return _rows([*read.train, *read.val], seq_len)
    path = _text_path(cfg)
    text = _Text(path, _file_sha256(path), tokenizer, cfg.resident_mb, cfg.special_tokens)
    return TokenStream(text.tokens((0, None)), seq_len)


def identity(cfg: DataConfig) -> str:
    """sha256 (hex) of the data: of a text the file's, of a prepared corpus its manifest's, of transcripts as
    `transcripts.identity` says.

    Raises:
      UserError: data that are missing.
    """
    if (prepared := _prepared(cfg)) is not None:
        return prepared.sha256
    if cfg.tokenizer == "transcript":
        return transcripts.identity(*_transcript_files(cfg))
    return _file_sha256(_text_path(cfg))


class Transcripts(NamedTuple):
    """Both splits as utterances, uncut and without <eos> around them."""

    train: list[transcripts.Utterance]
    val: list[transcripts.Utterance]
    sha256: str
    """As `transcripts.identity` says."""


def read_transcripts(cfg: DataConfig) -> Transcripts:
    """Reads both splits of transcripts.

    Raises:
      UserError: as `load_corpus`.
    """
    train_files, val_files = _transcript_files(cfg)
    train, val = (transcripts.read(files, TranscriptTokenizer()) for files in (train_files, val_files))
    if not val_files:
        boundary = int((1 - cfg.val_fraction) * len(train))
        train, val = train[:boundary], train[boundary:]
    return Transcripts(train, val, transcripts.identity(train_files, val_files))


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids 0 .. V - 1."""
    return np.min_scalar_type(vocab_size - 1)


def _rows(utterances: list[transcripts.Utterance], seq_len: int) -> PaddedRows:
    tokenizer = TranscriptTokenizer()
    return PaddedRows(transcripts.cut(utterances, tokenizer, seq_len), tokenizer.pad_token)


def _check_kind(cfg: DataConfig) -> None:
    """Refuses a dataset that the tokenizer does not read, before anything is fetched."""
    kind = sources.kind(cfg.dataset)
    if (kind == "transcripts") != (cfg.tokenizer == "transcript"):
        fix = "transcript" if kind == "transcripts" else "char or bpe"
        raise UserError(
            f"dataset {cfg.dataset!r} is {'a text' if kind == 'text' else kind}, which tokenizer = "
            f"{cfg.tokenizer!r} does not read: use --data.tokenizer {fix}, or another --data.dataset or --data.path"
        )


def _transcript_files(cfg: DataConfig) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files to train on and the held-out ones, which may be none."""
    if cfg.path:
        held_out = transcripts.find_files(Path(cfg.val_path)) if cfg.val_path else ()
        return transcripts.find_files(Path(cfg.path)), held_out
    _check_kind(cfg)
    return sources.fetch(cfg.dataset)


def _text_path(cfg: DataConfig) -> Path:
    if cfg.path:
        path = Path(cfg.path)
    else:
        _check_kind(cfg)
        path = sources.fetch(cfg.dataset).train[0]
    if not path.exists():
        raise _missing(path)
    if not path.is_file():
        raise UserError(f"corpus {path} is not a file: give an existing UTF-8 text by --data.path")
    return path


def _missing(path: Path | str) -> UserError:
    return UserError(f"corpus {path} does not exist: give an existing UTF-8 text or prepared corpus by --data.path")


def _boundary(cfg: DataConfig, path: Path) -> int:
    """How many characters of a text are for training."""
    characters = sum(len(block) for block in _blocks(path))
    if characters == 0:
        raise UserError(f"corpus {path} is empty: give a text")
    return int((1 - cfg.val_fraction) * characters)


def _learn_tokenizer(cfg: DataConfig, path: Path, boundary: int) -> Tokenizer:
    if cfg.tokenizer == "source":
        raise UserError(
            "data.tokenizer = 'source' is the tokenizer of another model: add --init-from, or choose char or bpe"
        )
    if cfg.tokenizer == "char":
        return CharTokenizer(frozenset().union(*map(frozenset, _blocks(path))))
    return BPETokenizer.train(_blocks(path, (0, boundary)), cfg.bpe_vocab_size)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(path: Path, span: Span = (0, None)) -> Iterator[str]:
    """A part of a UTF-8 file, at most BLOCK_CHARS characters at a time; newlines are kept as they are."""
    start, stop = span
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, offset = 0, 0  # characters and bytes consumed before the current read
    with path.open("rb") as file:
        while stop is None or place < stop:
            raw = file.read(BLOCK_CHARS)
            pending = len(decoder.getstate()[0])  # bytes of a character that the previous block cut in two
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise not_utf8(f"corpus {path}", byte, offset - pending + error.start) from None
            end = len(text) if stop is None else stop - place
            if piece := text[max(start - place, 0) : end]:
                yield piece
            place, offset = place + len(text), offset + len(raw)
            if not raw:
                return


class _Text(NamedTuple):
    """A text file and how its parts become tokens."""

    path: Path
    sha256: str
    tokenizer: Tokenizer
    resident_mb: int
    special_tokens: SpecialTokens

    def tokens(self, span: Span) -> np.ndarray:
        """The tokens of a part, in memory, or memory-mapped if the text is large."""
        dtype = token_dtype(self.tokenizer.vocab_size)
        if self.path.stat().st_size > self.resident_mb << 20:
            return self._mapped(span, dtype)
        return np.concatenate([np.empty(0, dtype), *self._encoded(span, dtype)])

    def _encoded(self, span: Span, dtype: np.dtype) -> Iterator[np.ndarray]:
        place = span[0]  # of the block that is being encoded

        def blocks() -> Iterator[str]:
            nonlocal place
            for block in _blocks(self.path, span):
                yield block
                place += len(block)

        try:
            for ids in self.tokenizer.encode_blocks(blocks(), self.special_tokens):
                yield ids.astype(dtype)
        except UserError as error:
            where = f", from character {place} on" if place else ""
            raise UserError(f"corpus {self.path}{where}: {error}") from None

    def _mapped(self, span: Span, dtype: np.dtype) -> np.ndarray:
        """The token file of a part, which the first call writes."""
        made_of = json.dumps([self.sha256, self.tokenizer.to_dict(), span, self.special_tokens])
        key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        target = sources.data_dir() / "tokens" / f"{self.path.stem}-{key}.bin"
        if not target.exists():
            with staged(target, "set JAXLM_DATA_DIR to a folder with more space") as path, path.open("wb") as file:
                for ids in self._encoded(span, dtype):
                    file.write(ids.data)  # unlike tofile, this says why it fails
        return np.memmap(target, dtype, mode="r") if target.stat().st_size else np.empty(0, dtype)
