"""Text to token ids and back: by characters, the alphabet of speech transcripts, or ids as text; `bpe` has the rest."""

import operator
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxlm.config.sampling import SpecialTokens
from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.files import check_utf8, read_sealed
from jaxlm.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of jaxlm needs from a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_token(self) -> int | None:
        """The id that begins and ends each row; None where the data have no rows."""

    @property
    def pad_token(self) -> int | None:
        """The id that fills up a row and is never a target; None where the data have no rows."""

    def encode(self, text: str, special_tokens: SpecialTokens = "id") -> Int[np.ndarray, " n"]:
        """The ids of a text that goes on, int32: with the tokens that begin a text, without those that end one.

        Args:
          special_tokens: what the spelling of a special token becomes. Only imported tokenizers have special tokens.
        """

    def encode_blocks(
        self, blocks: Iterable[str], special_tokens: SpecialTokens = "text"
    ) -> Iterator[Int[np.ndarray, " n"]]:
        """The ids of a whole text that comes in blocks, whatever their size, with the tokens that begin and end it."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids."""

    @property
    def byte_tokens(self) -> frozenset[int]:
        """Ids of single bytes of a character, whose text depends on the ids beside them."""

    def token_bytes(self) -> Int[np.ndarray, " V"] | None:
        """Bytes of UTF-8 text that each id stands for; None if that is not known."""

    @property
    def added_bytes(self) -> int:
        """How many bytes the targets of a whole text stand for beyond the text's own: a space or an end put there."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types from which `from_dict` builds the same tokenizer."""


class CharTokenizer:
    """One id per character, in code-point order."""

    eos_token: None = None
    pad_token: None = None
    byte_tokens: frozenset[int] = frozenset()
    added_bytes: int = 0

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = "".join(sorted(set(chars)))
        self._codes = _code_points(self.chars)

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.chars)

    def encode(self, text: str, special_tokens: SpecialTokens = "id") -> Int[np.ndarray, " n"]:
        """The ids of a text, int32.

        Raises:
          UserError: characters outside the vocabulary; the message names them and the place of the first.
        """
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes)
        wrong = self._codes[np.minimum(ids, self.vocab_size - 1)] != codes
        if wrong.any():
            where = int(wrong.argmax())
            unknown = "".join(sorted({text[i] for i in np.flatnonzero(wrong)}))
            raise UserError(
                f"characters {unknown!r} are outside the vocabulary (first {text[where]!r} at position {where}): "
                f"use only {self.chars!r}"
            )
        return ids.astype(np.int32)

    def encode_blocks(
        self, blocks: Iterable[str], special_tokens: SpecialTokens = "text"
    ) -> Iterator[Int[np.ndarray, " n"]]:
        """The ids of a text that comes in blocks."""
        return map(self.encode, blocks)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids."""
        return "".join(self.chars[i] for i in ids)

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes of each character in UTF-8."""
        return np.array([len(char.encode()) for char in self.chars], np.int32)

    def to_dict(self) -> dict[str, Any]:
        """{"type": "char", "chars": the vocabulary}."""
        return {"type": "char", "chars": self.chars}


class TranscriptTokenizer:
    """The alphabet of English speech transcripts: 0..25 A-Z, 26 apostrophe, 27 space, 28 <eos>, 29 <pad>."""

    byte_tokens: frozenset[int] = frozenset()
    added_bytes: int = 0
    _CHARACTERS = string.ascii_uppercase + "' "

    def __init__(self) -> None:
        self._spelled = [*self._CHARACTERS, "<eos>", "<pad>"]
        self._known = CharTokenizer(self._CHARACTERS)
        self._ids = np.array([self._CHARACTERS.index(c) for c in self._known.chars], np.int32)

    @property
    def vocab_size(self) -> int:
        """30."""
        return len(self._spelled)

    @property
    def eos_token(self) -> int:
        """28, which begins and ends each transcript."""
        return len(self._CHARACTERS)

    @property
    def pad_token(self) -> int:
        """29, which fills up a row."""
        return len(self._CHARACTERS) + 1

    def encode(self, text: str, special_tokens: SpecialTokens = "id") -> Int[np.ndarray, " n"]:
        """The ids of the characters of a transcript, int32, without <eos> or <pad>.

        Raises:
          UserError: characters outside the vocabulary; the message names them and the place of the first.
        """
        try:
            return self._ids[self._known.encode(text)]
        except UserError as error:
            hint = "; write letters in upper case" if set(text) & set(string.ascii_lowercase) else ""
            raise UserError(f"{error}{hint}") from None

    def encode_blocks(
        self, blocks: Iterable[str], special_tokens: SpecialTokens = "text"
    ) -> Iterator[Int[np.ndarray, " n"]]:
        """The ids of a text that comes in blocks."""
        return map(self.encode, blocks)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids; <eos> and <pad> are spelled out."""
        return "".join(self._spelled[i] for i in ids)

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """1 for each character; <eos> and <pad> are not text."""
        return np.array([1] * len(self._CHARACTERS) + [0, 0], np.int32)

    def to_dict(self) -> dict[str, Any]:
        """{"type": "transcript"}."""
        return {"type": "transcript"}


class IdTokenizer:
    """Decimal ids with spaces between them, "12 5 7": for a model whose tokenizer is not available."""

    eos_token: None = None
    pad_token: None = None
    byte_tokens: frozenset[int] = frozenset()
    added_bytes: int = 0

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._vocab_size

    def encode(self, text: str, special_tokens: SpecialTokens = "id") -> Int[np.ndarray, " n"]:
        """The ids of a text, int32.

        Raises:
          UserError: a word that is not a decimal number below the vocabulary's size.
        """
        words = text.split()
        for word in words:
            digits = word.isascii() and word.isdigit()
            if not digits or len(word) > 9 or int(word) >= self.vocab_size:
                shown = word if len(word) <= 40 else f"{word[:40]}..."
                what = "outside the vocabulary" if digits else "not a token id"
                raise UserError(
                    f"{shown!r} is {what}: this tokenizer reads ids from 0 to {self.vocab_size - 1} "
                    f"with spaces between them, such as '0 {self.vocab_size - 1}'"
                )
        return np.array(words, np.int32)

    def encode_blocks(
        self, blocks: Iterable[str], special_tokens: SpecialTokens = "text"
    ) -> Iterator[Int[np.ndarray, " n"]]:
        """The ids of a text that comes in blocks, which may cut an id in two."""
        cut = ""
        for block in blocks:
            text = cut + block
            cut = "" if text[-1:].isspace() else text.rsplit(maxsplit=1)[-1]
            yield self.encode(text[: len(text) - len(cut)])
        yield self.encode(cut)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Each id after a space, so that texts can be joined."""
        return "".join(f" {operator.index(i)}" for i in ids)

    def token_bytes(self) -> None:
        """None: what text the ids stand for is not known."""
        return

    def to_dict(self) -> dict[str, Any]:
        """{"type": "ids", "vocab_size": V}."""
        return {"type": "ids", "vocab_size": self.vocab_size}


def from_dict(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described.

    Raises:
      UserError: an unknown type.
    """
    match data.get("type"):
        case "char":
            if not isinstance(chars := data["chars"], str) or not chars:
                raise UserError(f"its chars are {chars!r:.40}: give a text of at least one character")
            return CharTokenizer(chars)
        case "bpe":
            return BPETokenizer.from_json(data["tokenizer"])
        case "transcript":
            return TranscriptTokenizer()
        case "ids":
            return IdTokenizer(_size(data["vocab_size"]))
        case other:
            raise UserError(f"tokenizer type {other!r} is unknown: expected 'char', 'bpe', 'transcript' or 'ids'")


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"its vocab_size is {value!r:.40}: give a whole number from 1 to 2^31 - 1")
    return value


def load(path: Path, fix: str = "restore it, or train again") -> Tokenizer:
    """Reads the tokenizer.json of a run or of a prepared corpus.

    Args:
      fix: what the message tells the user to do.

    Raises:
      UserError: the file is missing or does not hold a tokenizer.
    """
    content = read_sealed(path, fix)
    try:
        return from_dict(content)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"{path} does not hold a tokenizer ({error}): {fix}") from None


def prompt_ids(
    text: str, tokenizer: Tokenizer, name: str = "prompt", special_tokens: SpecialTokens = "id"
) -> Int[np.ndarray, " n"]:
    """The ids that a model reads for a text that goes on, int32; what begins a text or a row stands in front.

    Args:
      name: what a refusal calls the text.
      special_tokens: as in `Tokenizer.encode`.

    Raises:
      UserError: the text is empty (and no token precedes it), is not UTF-8, or has characters outside the vocabulary.
    """
    check_utf8(text, name)
    frame = [] if tokenizer.eos_token is None else [tokenizer.eos_token]
    ids = np.concatenate([np.array(frame, np.int32), tokenizer.encode(text, special_tokens)])
    if not len(ids):
        what = f"{text!r} has no token: give other text" if text else "is empty: give at least one character"
        raise UserError(f"{name} {what}")
    return ids


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
