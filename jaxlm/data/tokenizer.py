"""Text to token ids and back: by characters, byte-level BPE, the alphabet of speech transcripts, or ids as text."""

import json
import operator
import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxlm.data.files import check_utf8
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import tokenizers  # where it is not needed, a command starts without it


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

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """The ids of a text, int32."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids."""

    def token_bytes(self) -> Int[np.ndarray, " V"] | None:
        """Bytes of UTF-8 text that each id stands for; None if the ids stand for no text."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types from which `from_dict` builds the same tokenizer."""


class CharTokenizer:
    """One id per character, in code-point order."""

    eos_token: None = None
    pad_token: None = None

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = "".join(sorted(set(chars)))
        self._codes = _code_points(self.chars)

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.chars)

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
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

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids."""
        return "".join(self.chars[i] for i in ids)

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes of each character in UTF-8."""
        return np.array([len(char.encode()) for char in self.chars], np.int32)

    def to_dict(self) -> dict[str, Any]:
        """{"type": "char", "chars": the vocabulary}."""
        return {"type": "char", "chars": self.chars}


class BPETokenizer:
    """Byte-level byte-pair encoding as in GPT-2: it encodes any text, and nothing is unknown."""

    eos_token: None = None
    pad_token: None = None

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token is encoded as text
        self._vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def train(cls, blocks: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns merges from text; there are fewer than `vocab_size` ids if the text runs out of pairs."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(blocks, trainer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return self._vocab_size

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """The ids of a text, int32."""
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes of each token; an id without a token has none."""
        counts = np.zeros(self._vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            counts[i] = len(token)  # byte-level BPE spells each byte as one character
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[i] = len(added.content.encode())
        return counts

    def to_dict(self) -> dict[str, Any]:
        """{"type": "bpe", "tokenizer": the JSON of the tokenizers library}."""
        return {"type": "bpe", "tokenizer": json.loads(self._tokenizer.to_str())}


class TranscriptTokenizer:
    """The alphabet of English speech transcripts: 0..25 A-Z, 26 apostrophe, 27 space, 28 <eos>, 29 <pad>."""

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

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """The ids of the characters of a transcript, int32, without <eos> or <pad>.

        Raises:
          UserError: characters outside the vocabulary; the message names them and the place of the first.
        """
        try:
            return self._ids[self._known.encode(text)]
        except UserError as error:
            hint = "; write letters in upper case" if set(text) & set(string.ascii_lowercase) else ""
            raise UserError(f"{error}{hint}") from None

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

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._vocab_size

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """The ids of a text, int32.

        Raises:
          UserError: a word that is not a decimal number below the vocabulary's size.
        """
        words = text.split()
        for word in words:
            digits = word.isascii() and word.isdigit()
            if not digits or len(word) > 9 or int(word) >= self.vocab_size:
                raise UserError(
                    f"{word!r} is {'outside the vocabulary' if digits else 'not a token id'}: this tokenizer reads ids "
                    f"from 0 to {self.vocab_size - 1} with spaces between them, such as '0 {self.vocab_size - 1}'"
                )
        return np.array(words, np.int32)

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
            return CharTokenizer(data["chars"])
        case "bpe":
            return _bpe(data["tokenizer"])
        case "transcript":
            return TranscriptTokenizer()
        case "ids":
            return IdTokenizer(operator.index(data["vocab_size"]))
        case other:
            raise UserError(f"tokenizer type {other!r} is unknown: expected 'char', 'bpe', 'transcript' or 'ids'")


def from_hugging_face(data: dict[str, Any]) -> BPETokenizer:
    """The tokenizer of Hugging Face's tokenizer.json, without its truncation and padding of texts.

    What its post-processor puts in front of a text, such as <|begin_of_text|>, is put in front here too.

    Raises:
      UserError: it is not a byte-level BPE. In other kinds the text of a token depends on the tokens before it, so
        texts cannot be joined.
    """
    for part, needed in (("model", "BPE"), ("decoder", "ByteLevel")):
        entry = data.get(part)
        kind = entry.get("type") if isinstance(entry, dict) else entry
        if kind != needed:
            raise UserError(f"its {part} is of type {kind!r}, only {needed!r} is supported")
    return _bpe({**data, "truncation": None, "padding": None})


def _bpe(data: dict[str, Any]) -> BPETokenizer:
    """The tokenizer of a JSON of the tokenizers library."""
    import tokenizers

    return BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))


def load(path: Path) -> Tokenizer:
    """Reads a run's tokenizer.json.

    Raises:
      UserError: the file is missing or does not hold a tokenizer.
    """
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"{path} does not hold a tokenizer ({error}): restore it, or train again") from None


def prompt_ids(text: str, tokenizer: Tokenizer, name: str = "prompt") -> Int[np.ndarray, " n"]:
    """The ids that a model reads for a text, int32; <eos> comes first if the tokenizer's rows begin with it.

    Args:
      name: what a refusal calls the text.

    Raises:
      UserError: the text is empty (and no <eos> precedes it), is not UTF-8, or has characters outside the vocabulary.
    """
    if not text and tokenizer.eos_token is None:
        raise UserError(f"{name} is empty: give at least one character")
    check_utf8(text, name)
    frame = [] if tokenizer.eos_token is None else [tokenizer.eos_token]
    ids = np.concatenate([np.array(frame, np.int32), tokenizer.encode(text)])
    if not len(ids):
        raise UserError(f"{name} {text!r} has no token: give other text")
    return ids


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
