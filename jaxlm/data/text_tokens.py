"""The tokens of a part of a text: in memory, or in a file of the data cache if the text is large."""

import hashlib
import json
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt

from jaxlm.config.sampling import SpecialTokens
from jaxlm.data import sources
from jaxlm.data.files import staged
from jaxlm.data.texts import Span, Text
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids 0 .. V - 1."""
    return np.min_scalar_type(vocab_size - 1)


def text_tokens(
    text: Text, span: Span, tokenizer: Tokenizer, resident_mb: int, special_tokens: SpecialTokens
) -> UInt[np.ndarray, " n"]:
    """The ids of a part of a text, of the smallest unsigned type; memory-mapped if the text has over resident_mb MiB.

    Raises:
      UserError: characters outside the vocabulary (with the place), or a token file that cannot be written.
    """
    part = _Part(text, span, tokenizer, special_tokens)
    if text.size > resident_mb << 20:
        return part.mapped()
    return np.concatenate([np.empty(0, part.dtype), *part.encoded()])


class _Part:
    """A part of a text and how it becomes tokens."""

    def __init__(self, text: Text, span: Span, tokenizer: Tokenizer, special_tokens: SpecialTokens) -> None:
        self._text, self._span, self._tokenizer, self._special_tokens = text, span, tokenizer, special_tokens
        self.dtype = token_dtype(tokenizer.vocab_size)
        for number in () if text.keep_marks else sorted(text.marked):
            warnings.warn(f"{text.files[number].path} begins with a byte-order mark, which is left out", stacklevel=3)

    def encoded(self) -> Iterator[np.ndarray]:
        """The ids, some at a time."""
        place = self._span[0]  # of the block that is being encoded

        def blocks() -> Iterator[str]:
            nonlocal place
            for block in self._text.blocks(self._span):
                yield block
                place += len(block)

        try:
            for ids in self._tokenizer.encode_blocks(blocks(), self._special_tokens):
                yield ids.astype(self.dtype)
        except UserError as error:
            where = f", from character {place} on" if place else ""
            raise UserError(f"corpus {self._text.name}{where}: {error}") from None

    def mapped(self) -> np.ndarray:
        """The token file, which the first call writes."""
        made_of = [self._text.sha256, self._tokenizer.to_dict(), self._span, self._special_tokens]
        if self._text.marked and not self._text.keep_marks:
            made_of.append("without marks")  # files of earlier versions have them
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        target = sources.data_dir() / "tokens" / f"{self._text.stem}-{key}.bin"
        if not target.exists():
            with staged(target, "set JAXLM_DATA_DIR to a folder with more space") as path, path.open("wb") as file:
                for ids in self.encoded():
                    file.write(ids.data)  # unlike tofile, this says why it fails
        return np.memmap(target, self.dtype, mode="r") if target.stat().st_size else np.empty(0, self.dtype)
