"""From a text or transcripts to token splits: read, tokenize, split."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import DataConfig
from jaxlm.config.data import as_paths
from jaxlm.data import sources, texts, transcripts
from jaxlm.data.batches import PaddedRows, Split, TokenStream
from jaxlm.data.nanogpt_bins import is_bins, open_bins, sha256_of
from jaxlm.data.shards import PreparedCorpus, is_prepared, open_prepared
from jaxlm.data.text_tokens import text_tokens
from jaxlm.data.texts import Span, Text, open_text
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer, IdTokenizer, Tokenizer, TranscriptTokenizer
from jaxlm.data.tokenizer_file import kind, read_tokenizer_file
from jaxlm.errors import UserError


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

    A text (`texts.open_text`) is split by characters: the first 1 - val_fraction are for training; with a val_path all
    of it is. A character vocabulary is that of both splits; BPE merges are learned from the training split alone. Each
    split is encoded as one text: what an imported tokenizer puts in front of a text or behind it stands there once.
    Texts of more than `resident_mb` MiB go through a memory-mapped token file in the data cache, written once.
    Transcripts are split by utterances, and each utterance is cut into rows of its own. A folder that `jaxlm prepare`
    wrote has its own tokenizer, its shards are memory-mapped, and it is split by documents: the first
    floor((1 - val_fraction) * documents) are for training. A folder of nanoGPT has its own splits, memory-mapped.

    Args:
      seq_len: T, the targets of a training window or row.

    Raises:
      UserError: data that are missing, empty or not UTF-8 (with the byte offset), characters outside the vocabulary
        (with the place), an unknown dataset, or a tokenizer that does not suit the dataset.
      CheckError: a file of a prepared corpus is missing or damaged.
    """
    cfg, tokenizer = resolved(cfg, tokenizer)
    if (prepared := _prepared(cfg, tokenizer)) is not None:
        boundary, stop = prepared.boundary(cfg.val_fraction), len(prepared.tokens)
        parts = prepared.tokens.part(0, boundary), prepared.tokens.part(boundary, stop)
        train, val = (TokenStream(part, seq_len, prepared.end_of_text) for part in parts)
        return Corpus(prepared.tokenizer, train, val, prepared.sha256)
    if cfg.pack == "documents":
        for path in as_paths(cfg.path):
            if not Path(path).exists():
                raise texts.missing(path)
        raise UserError(
            "data.pack = 'documents' needs documents: prepare them by jaxlm prepare, and give its folder by --data.path"
        )
    if (folder := _bins(cfg)) is not None:
        bins = open_bins(folder, tokenizer)
        return Corpus(bins.tokenizer, TokenStream(bins.train, seq_len), TokenStream(bins.val, seq_len), bins.sha256)
    if cfg.tokenizer == "transcript":
        read = read_transcripts(cfg)
        return Corpus(TranscriptTokenizer(), _rows(read.train, seq_len), _rows(read.val, seq_len), read.sha256)
    splits = _TextSplits.open(cfg, _knows_marks(tokenizer))
    if tokenizer is None:
        tokenizer = splits.learn_tokenizer(cfg)
    if isinstance(tokenizer, IdTokenizer):
        splits = splits.between_words()
    how = tokenizer, cfg.resident_mb, cfg.special_tokens
    train, val = (TokenStream(text_tokens(text, span, *how), seq_len) for text, span in (splits.train, splits.val))
    return Corpus(tokenizer, train, val, splits.sha256)


def resolved(cfg: DataConfig, tokenizer: Tokenizer | None = None) -> tuple[DataConfig, Tokenizer | None]:
    """The config with a file in the data cache for stdin, and with a kind of tokenizer where it names a file.

    Args:
      tokenizer: goes before the one of the file.

    Returns:
      The config, and the tokenizer of the file or the given one, if there is either.

    Raises:
      UserError: stdin or the file cannot be read, or data that have tokens already are to be tokenized.
    """
    path, val_path = texts.with_stdin_kept(cfg.path), texts.with_stdin_kept(cfg.val_path)
    cfg = dataclasses.replace(cfg, path=path, val_path=val_path)
    if cfg.is_tokenizer_file:
        read = read_tokenizer_file(Path(cfg.tokenizer))
        if cfg.bpe_vocab_size not in (DataConfig.bpe_vocab_size, read.vocab_size):
            raise UserError(
                f"data.bpe_vocab_size = {cfg.bpe_vocab_size} is for a BPE that is learned, and {cfg.tokenizer} has "
                f"{read.vocab_size} entries: leave it out"
            )
        cfg, tokenizer = dataclasses.replace(cfg, tokenizer=kind(read)), tokenizer or read
    elif _bins(cfg) is not None and cfg.tokenizer in ("bpe", "transcript") and tokenizer is None:
        raise UserError(
            f"{cfg.path} holds tokens already, and data.tokenizer = {cfg.tokenizer!r} is for text: leave it out, or "
            "name the tokenizer.json of the tokens"
        )
    return with_own_tokenizer(cfg), tokenizer


def _folder(cfg: DataConfig, holds: Callable[[Path], bool], what: str) -> Path | None:
    """The path if it is a folder of a kind that stands alone; None if it is something else.

    Raises:
      UserError: it is one of several, or there is a val_path beside it.
    """
    paths = as_paths(cfg.path)
    found = [path for path in (*paths, *as_paths(cfg.val_path)) if holds(Path(path))]
    if not found:
        return None
    if len(paths) > 1 or cfg.val_path is not None:
        raise UserError(f"{found[0]} is {what}, which has splits of its own: give it alone by --data.path")
    return Path(found[0])


def _bins(cfg: DataConfig) -> Path | None:
    return _folder(cfg, is_bins, "a folder of nanoGPT's tokens")


def _prepared(cfg: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedCorpus | None:
    """The prepared corpus at the path; None if the data are something else.

    Raises:
      UserError: a tokenizer is given, and is not the corpus' own.
    """
    folder = _folder(cfg, is_prepared, "a prepared corpus")
    if folder is None:
        return None
    corpus = open_prepared(folder)
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
    is_own = any(is_prepared(Path(path)) for path in as_paths(cfg.path))
    return dataclasses.replace(cfg, tokenizer="bpe") if is_own else cfg


def learn_tokenizer(cfg: DataConfig) -> Tokenizer:
    """The tokenizer that `load_corpus` builds unless one is given.

    Raises:
      UserError: data that are missing, empty or not UTF-8, or an unknown dataset.
    """
    cfg, tokenizer = resolved(cfg)
    if (prepared := _prepared(cfg, tokenizer)) is not None:
        return prepared.tokenizer
    if (folder := _bins(cfg)) is not None:
        return open_bins(folder, tokenizer).tokenizer
    if tokenizer is not None:
        return tokenizer
    return TranscriptTokenizer() if cfg.tokenizer == "transcript" else _TextSplits.open(cfg).learn_tokenizer(cfg)


def load_unsplit(cfg: DataConfig, seq_len: int, tokenizer: Tokenizer) -> Split:
    """All of the data at `cfg.path` as one split, tokenized by a given tokenizer.

    Raises:
      UserError: as `load_corpus`.
    """
    cfg, _ = resolved(dataclasses.replace(cfg, val_path=None), tokenizer)
    if (prepared := _prepared(cfg, tokenizer)) is not None:
        return TokenStream(prepared.tokens, seq_len, prepared.end_of_text)
    if (folder := _bins(cfg)) is not None:
        return TokenStream(open_bins(folder, tokenizer).both, seq_len)
    if cfg.tokenizer == "transcript":
        read = read_transcripts(cfg)
        return _rows([*read.train, *read.val], seq_len)
    text = _open_text(cfg, _knows_marks(tokenizer))
    return TokenStream(text_tokens(text, (0, None), tokenizer, cfg.resident_mb, cfg.special_tokens), seq_len)


def identity(cfg: DataConfig) -> str:
    """sha256 (hex) of the data: of a text as `texts.Text` says, of a prepared corpus its manifest's, of a folder of
    nanoGPT as `nanogpt_bins.Bins` says, of transcripts as `transcripts.identity` says. A text with held-out texts is
    known by both as transcripts are.

    Raises:
      UserError: data that are missing.
    """
    cfg, _ = resolved(cfg)
    if (prepared := _prepared(cfg)) is not None:
        return prepared.sha256
    if (folder := _bins(cfg)) is not None:
        return sha256_of(folder)
    if cfg.tokenizer == "transcript":
        return transcripts.identity(*_transcript_files(cfg))
    return _both(_open_text(cfg), None if cfg.val_path is None else open_text(cfg.val_path, cfg.field))


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


def _rows(utterances: list[transcripts.Utterance], seq_len: int) -> PaddedRows:
    tokenizer = TranscriptTokenizer()
    return PaddedRows(transcripts.cut(utterances, tokenizer, seq_len), tokenizer.pad_token)


def _check_kind(cfg: DataConfig) -> None:
    """Refuses a dataset that the tokenizer does not read, before anything is fetched."""
    holds = sources.kind(cfg.dataset)
    if (holds == "transcripts") != (cfg.tokenizer == "transcript"):
        fix = "transcript" if holds == "transcripts" else "char or bpe"
        raise UserError(
            f"dataset {cfg.dataset!r} is {'a text' if holds == 'text' else holds}, which tokenizer = "
            f"{cfg.tokenizer!r} does not read: use --data.tokenizer {fix}, or another --data.dataset or --data.path"
        )


def _transcript_files(cfg: DataConfig) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files to train on and the held-out ones, which may be none."""
    if cfg.path is None:
        _check_kind(cfg)
        return sources.fetch(cfg.dataset)
    train, val = (
        tuple(file for path in as_paths(paths) for file in transcripts.find_files(Path(path)))
        for paths in (cfg.path, cfg.val_path)
    )
    return train, val


def _knows_marks(tokenizer: Tokenizer | None) -> bool:
    """Whether a tokenizer has a byte-order mark: in runs of earlier versions, that of their text is text."""
    return isinstance(tokenizer, CharTokenizer) and texts.MARK in tokenizer.chars


def _open_text(cfg: DataConfig, keep_marks: bool = False) -> Text:
    """The text to train on, or to split."""
    if cfg.path is not None:
        return open_text(cfg.path, cfg.field, keep_marks)
    _check_kind(cfg)
    return open_text(str(sources.fetch(cfg.dataset).train[0]), cfg.field, keep_marks)


def _both(train: Text, val: Text | None) -> str:
    """Identifies a text with its held-out text."""
    lines = "" if val is None else f"train {train.sha256}\nval {val.sha256}\n"
    return hashlib.sha256(lines.encode()).hexdigest() if lines else train.sha256


class _TextSplits(NamedTuple):
    """The parts of texts that are for training and for validation."""

    train: tuple[Text, Span]
    val: tuple[Text, Span]
    sha256: str

    @classmethod
    def open(cls, cfg: DataConfig, keep_marks: bool = False) -> "_TextSplits":
        """The splits of a config.

        Raises:
          UserError: as `texts.open_text`; a text is empty.
        """
        text = _open_text(cfg, keep_marks)
        characters = _characters(text)
        if cfg.val_path is not None:
            val = open_text(cfg.val_path, cfg.field, keep_marks)
            _characters(val)
            return cls((text, (0, None)), (val, (0, None)), _both(text, val))
        boundary = int((1 - cfg.val_fraction) * characters)
        return cls((text, (0, boundary)), (text, (boundary, None)), text.sha256)

    def between_words(self) -> "_TextSplits":
        """The splits with a boundary that does not cut a word, such as an id, in two."""
        text, (start, stop) = self.train
        if stop is None:
            return self
        after = itertools.chain.from_iterable(text.blocks((stop, None)))
        stop += sum(1 for _ in itertools.takewhile(lambda character: not character.isspace(), after))
        return self._replace(train=(text, (start, stop)), val=(text, (stop, None)))

    def learn_tokenizer(self, cfg: DataConfig) -> Tokenizer:
        """A tokenizer of characters for both splits, or of byte pairs from the one for training."""
        if cfg.tokenizer == "source":
            raise UserError(
                "data.tokenizer = 'source' is the tokenizer of another model: add --init-from, or choose char or bpe"
            )
        text, span = self.train
        if cfg.tokenizer == "bpe":
            return BPETokenizer.train(text.blocks(span), cfg.bpe_vocab_size)
        whole = {text.sha256: text, self.val[0].sha256: self.val[0]}.values()  # once, if one is a part of the other
        return CharTokenizer(frozenset().union(*(frozenset(block) for text in whole for block in text.blocks())))


def _characters(text: Text) -> int:
    """How many characters a text has, at least one."""
    characters = sum(map(len, text.blocks()))
    if not characters:
        raise UserError(f"corpus {text.name} is empty: give a text")
    return characters
