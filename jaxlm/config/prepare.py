"""How a large corpus is prepared: what is read, how it is cut into documents and shards."""

import dataclasses

from jaxlm.config.base import Validated, check_at_least
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig(Validated):
    """Everything that decides the token shards of a corpus, but for an existing tokenizer."""

    path: str
    """A .txt, .jsonl or .parquet file, a folder that holds such files at any depth, or a pattern (*.jsonl). The first
    two may be compressed (.gz, .bz2, .xz)."""
    field: str = "text"
    """The field of a .jsonl line, or the column of a .parquet file, that holds the text of a document."""
    separator: str | None = None
    """The line between two documents of a .txt file, '' = an empty line; None = each .txt file is one document."""
    bpe_vocab_size: int = 4096
    """Most entries of a new byte-level BPE, its 256 bytes and its end-of-text token included."""
    val_fraction: float = 0.1
    """A new tokenizer learns nothing from the last val_fraction of the bytes, which training may hold out."""
    shard_tokens: int = 50_000_000
    """Tokens of each shard; the last one has the rest."""

    @property
    def option(self) -> str:
        """The option that sets `field`, for messages."""
        return "--field"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 257, "bpe_vocab_size")
        check_at_least(self, 1, "shard_tokens")
        if not self.path:
            raise UserError("data.path = '' names nothing: give a file, a folder or a pattern")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction!r} is out of range: give 0 < val_fraction < 1")
        if self.separator is not None and ("\n" in self.separator or "\r" in self.separator):
            raise UserError(f"separator = {self.separator!r} is more than a line: give the text of one line")
        if not self.field:
            raise UserError("field = '' names nothing: give the field that holds the text")
