"""DataConfig: which data a run reads, and how they become tokens."""

import dataclasses
from typing import Literal

from jaxlm.config.base import Validated, check_at_least
from jaxlm.config.sampling import SpecialTokens
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Validated):
    """Which text or transcripts, and how they become tokens."""

    dataset: str = "tinyshakespeare"
    """Name of a dataset, tinyshakespeare or librispeech; ignored if path is given."""
    path: str | None = None
    """Your own data instead of a recipe: a UTF-8 text file; a folder of `jaxlm prepare`; for transcripts a CSV file
    (id,transcript), a folder of CSV files, or a folder of .npy files with one utterance each."""
    val_path: str | None = None
    """Transcripts held out for validation, in the same form as path; None = the last val_fraction of path's."""
    tokenizer: Literal["char", "bpe", "transcript", "source"] = "char"
    """char: one token per character of the text; bpe: byte-level BPE trained on the training split; transcript: A-Z,
    apostrophe, space, <eos> and <pad>, each transcript in rows of its own as <eos> ... <eos>; source: that of the model
    that training goes on from (--init-from). A folder of `jaxlm prepare` has its own, which is bpe."""
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
    if val_path or the dataset gives held-out files."""
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
            if getattr(self, name) == "":
                raise UserError(f"data.{name} = '' names nothing: give a path, or leave it out")
        if self.val_path is not None and self.tokenizer not in ("transcript", "source"):
            raise UserError(
                f"val_path = {self.val_path!r} is for tokenizer = 'transcript', not {self.tokenizer!r}: leave it out; "
                "val_fraction splits a text"
            )
        if self.val_path is not None and self.path is None:
            raise UserError(
                f"val_path = {self.val_path!r} needs a path of your own: give path too, or leave val_path out"
            )
