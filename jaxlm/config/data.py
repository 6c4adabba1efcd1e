"""DataConfig: which data a run reads, and how they become tokens."""

import dataclasses
import os
from pathlib import Path
from typing import Literal, TypeAlias

from jaxlm.config.base import Validated, check_at_least
from jaxlm.config.sampling import SpecialTokens
from jaxlm.errors import UserError

Paths: TypeAlias = str | tuple[str, ...] | None
"""One path, several in the order in which they are read, or none. A command takes its option once for each."""

STDIN = "-"
"""The path that stands for what comes in on stdin."""

TOKENIZERS = "char", "bpe", "transcript", "source"
"""The kinds of tokenizer; anything else names a file."""


def as_paths(value: Paths) -> tuple[str, ...]:
    """The paths as a tuple, which is empty for None."""
    return () if value is None else (value,) if isinstance(value, str) else value


def absolute(value: Paths | Path) -> Paths:
    """The paths made absolute, but for that of stdin."""
    paths = as_paths(str(value) if isinstance(value, Path) else value)
    whole = tuple(path if path == STDIN else str(Path(path).absolute()) for path in paths)
    return whole[0] if len(whole) == 1 else whole or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Validated):
    """Which text or transcripts, and how they become tokens."""

    dataset: str = "tinyshakespeare"
    """Name of a dataset, tinyshakespeare or librispeech; ignored if path is given."""
    path: Paths = None
    """Your own data instead of a recipe: a UTF-8 text or a .jsonl or .parquet file (.gz, .bz2 and .xz are read too), a
    folder of such files, a pattern ('*.txt'), - for stdin; give it again for several, read in that order. Or a folder
    of `jaxlm prepare`, or one with nanoGPT's train.bin and val.bin. For transcripts a CSV file (id,transcript), a
    folder of CSV files, or a folder of .npy files with one utterance each."""
    val_path: Paths = None
    """Texts or transcripts held out for validation, in the same form as path; None = the last val_fraction of
    path's."""
    field: str = "text"
    """The field of a .jsonl line, or the column of a .parquet file, that holds the text."""
    tokenizer: str = "char"
    """char: one token per character of the text; bpe: byte-level BPE trained on the training split; transcript: A-Z,
    apostrophe, space, <eos> and <pad>, each transcript in rows of its own as <eos> ... <eos>; source: that of the model
    that training goes on from (--init-from); or a FILE: the tokenizer.json of a run or of Hugging Face, or its folder.
    A folder of `jaxlm prepare` has its own, which is bpe."""
    bpe_vocab_size: int = 4096
    """Most entries of the byte-level BPE, including its 256 bytes."""
    special_tokens: SpecialTokens = "text"
    """What <|endoftext|> and the like in the text become, with an imported tokenizer: id, their one token each; text,
    the tokens of their characters."""
    pack: Literal["stream", "documents"] = "stream"
    """What a token of a window attends to. stream: all before it; documents: those of its own document, in a corpus
    that `jaxlm prepare` wrote. The windows are the same."""
    val_fraction: float = 0.1
    """Share of the text (of the documents, or of the transcripts) that is held out for validation, at the end; unused
    if val_path, the dataset or a folder of nanoGPT gives held-out data."""
    resident_mb: int = 256
    """Texts up to this many MiB are tokenized in memory and live on the device; larger ones go through a
    memory-mapped token file in the data cache. Transcripts are always in memory, prepared corpora never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 256, "bpe_vocab_size")
        check_at_least(self, 0, "resident_mb")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction!r} is out of range: give 0 < val_fraction < 1")
        for name in ("path", "val_path"):
            paths = as_paths(getattr(self, name))
            if len(paths) == 1:  # one path is a string, however it was given
                object.__setattr__(self, name, paths[0])
            if getattr(self, name) == () or "" in paths:
                raise UserError(f"data.{name} = {getattr(self, name)!r} names nothing: give a path, or leave it out")
        if (as_paths(self.path) + as_paths(self.val_path)).count(STDIN) > 1:
            raise UserError("data.path and data.val_path name stdin (-) twice: it is read once, give files")
        if not self.field:
            raise UserError("data.field = '' names nothing: give the field that holds the text")
        if self.tokenizer not in TOKENIZERS and not self.is_tokenizer_file:
            raise UserError(
                f"tokenizer = {self.tokenizer!r} is unknown: choose one of {', '.join(TOKENIZERS)}, or give a "
                "tokenizer.json (a folder by ./NAME)"
            )
        if self.val_path is not None and self.path is None:
            raise UserError(
                f"val_path = {self.val_path!r} needs a path of your own: give path too, or leave val_path out"
            )

    @property
    def is_tokenizer_file(self) -> bool:
        """Whether `tokenizer` names a file or a folder instead of a kind."""
        has_separator = any(mark in self.tokenizer for mark in (os.sep, os.altsep) if mark)
        return has_separator or self.tokenizer.endswith(".json")

    @property
    def name(self) -> str:
        """What messages and tables call the data."""
        return ", ".join(as_paths(self.path)) or self.dataset
