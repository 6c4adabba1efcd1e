"""Byte-pair encoding, by the tokenizers library: trained here, or another model's with its special tokens."""

import functools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from jaxlm.config.sampling import SpecialTokens
from jaxlm.data.bpe_training import learn_merges, whole_words
from jaxlm.data.tokenizer_json import check_bpe, no_panic

if TYPE_CHECKING:
    import tokenizers  # where it is not needed, a command starts without it

END_OF_TEXT = "<|endoftext|>"
"""The special token that ends each document of a prepared corpus, in a tokenizer that is learned there."""

MARGIN = 1 << 12
"""Characters on both sides of a cut between two blocks, far more than reach from one token to another."""


class BPETokenizer:
    """Byte-pair encoding of bytes as in GPT-2, or of characters with single bytes for the rest as in Llama 2.

    It encodes any text. What its post-processor puts around a text, such as <|begin_of_text|>, is in `encode_blocks`;
    `encode` leaves out the end, because its text is to go on.
    """

    eos_token: None = None
    pad_token: None = None

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        import tokenizers

        self._tokenizer = tokenizer
        self._vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        any_text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"text": 0}, "text")).encode("text")
        framed = tokenizer.post_process(any_text)
        place = framed.sequence_ids.index(0)
        self.before, self.after = framed.ids[:place], framed.ids[place + 1 :]
        """Ids that the post-processor puts in front of a text, and behind it."""
        self._post_processor = tokenizer.post_processor
        tokenizer.post_processor = None  # some would also shorten the places of tokens in the text
        self._steps = decoder_steps(json.loads(tokenizer.to_str()).get("decoder"))

    @classmethod
    def train(cls, blocks: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns merges from text; there are fewer than `vocab_size` ids if the text runs out of pairs.

        Words of more than `bpe_training.WORD_BYTES` bytes count as several. Progress goes to stderr.
        """
        return cls(learn_merges(whole_words(blocks), vocab_size, []))

    @classmethod
    def train_on_documents(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """As `train`, silently, from texts that stand alone; id 0 is END_OF_TEXT, which no text becomes."""
        return cls(learn_merges(texts, vocab_size, [END_OF_TEXT], announce=False))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "BPETokenizer":
        """The tokenizer of a JSON of the library, without truncation and padding; UserError if it cannot be read."""
        import tokenizers

        data = {**data, "truncation": None, "padding": None}  # of no use here; some would take any memory
        check_bpe(data)
        with no_panic("the tokenizers library cannot read it"):
            return cls(tokenizers.Tokenizer.from_str(json.dumps(data)))

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return self._vocab_size

    def encode(self, text: str, special_tokens: SpecialTokens = "id") -> Int[np.ndarray, " n"]:
        """The ids of a text that goes on, int32."""
        return np.array([*self.before, *self._encoding(text, special_tokens).ids], np.int32)

    def encode_blocks(
        self, blocks: Iterable[str], special_tokens: SpecialTokens = "text"
    ) -> Iterator[Int[np.ndarray, " n"]]:
        """The ids of a whole text that comes in blocks.

        What a token is depends on the text around it. So the ids near the end of a block wait for the next one, which
        is encoded together with some of the text before it.
        """
        yield np.array(self.before, np.int32)
        text, passed = "", 0  # text that is still needed; the ids of so many characters have been yielded
        for block in blocks:
            text += block
            if len(text) < passed + 4 * MARGIN:
                continue
            encoding = self._encoding(text, special_tokens)
            stop, place = _last_cut(encoding, len(text) - MARGIN)
            context = _last_cut(encoding, place - MARGIN)[1]
            again, left = self._encoding(text[context:], special_tokens), len(encoding) - stop
            # A cut is sound where the ids behind it are the same without most of the text before it.
            same = len(again) >= left and again.ids[-left:] == encoding.ids[-left:]
            if place > passed and same and _is_cut(again, len(again) - left, place - context):
                yield np.array(encoding.ids[_first_from(encoding, passed) : stop], np.int32)
                text, passed = text[context:], place - context
        encoding = self._encoding(text, special_tokens)
        yield np.array(encoding.ids[_first_from(encoding, passed) :] + self.after, np.int32)

    def _encoding(self, text: str, special_tokens: SpecialTokens) -> "tokenizers.Encoding":
        self._tokenizer.encode_special_tokens = special_tokens == "text"
        with no_panic("the tokenizer cannot encode this text"):
            return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        with no_panic("the tokenizer cannot decode these ids"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids such as that of <0xE4>, if the tokenizer has them. One byte that is wrong spoils all beside it."""
        if not any(step["type"] == "ByteFallback" for step in self._steps):
            return frozenset()
        ids = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in ids if i is not None)

    def token_bytes(self) -> Int[np.ndarray, " V"] | None:
        """Bytes of each token; an id without a token has none. None if text may be unknown."""
        vocabulary, by_bytes = self._tokenizer.get_vocab(with_added_tokens=False), self.byte_tokens
        if self._tokenizer.model.unk_token in vocabulary and not _knows_all(vocabulary, by_bytes):
            return None
        counts = np.zeros(self._vocab_size, np.int32)
        for token, i in vocabulary.items():
            counts[i] = 1 if i in by_bytes else len(self._spelled(token))
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[i] = 1 if i in by_bytes else len(added.content.encode())
            # Some put a space in front of what follows a special token: a byte that is not in the text.
            counts[i] -= self._sum(counts, f"x{added.content}x") - self._sum(counts, "xx") - counts[i]
        return counts

    @property
    def added_bytes(self) -> int:
        """Bytes of the tokens around a text, and of the space that some tokenizers put in front of it.

        The first id of a text is no target. So a space in front counts only where another token precedes it.
        """
        counts = self.token_bytes()
        if counts is None:
            return 0
        space = 2 * self._sum(counts, "x") - self._sum(counts, "xx") if self.before else 0
        return space + int(counts[[*self.before[1:], *self.after]].sum())

    def _sum(self, counts: Int[np.ndarray, " V"], text: str) -> int:
        """The bytes of the ids of a text without what stands around it."""
        return int(counts[self._encoding(text, "id").ids].sum())

    def _spelled(self, token: str) -> bytes | str:
        """The bytes of a token of the vocabulary; byte-level BPE spells each byte as one character."""
        for step in self._steps:
            if step["type"] == "ByteLevel":
                return token
            if step["type"] == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            if step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
        return token.encode()

    def to_dict(self) -> dict[str, Any]:
        """{"type": "bpe", "tokenizer": the JSON of the tokenizers library}."""
        self._tokenizer.post_processor = self._post_processor
        data = json.loads(self._tokenizer.to_str())
        self._tokenizer.post_processor = None
        return {"type": "bpe", "tokenizer": data}


def decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder of the tokenizers library, one after another."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in decoder_steps(part)]


def _knows_all(vocabulary: dict[str, int], by_bytes: frozenset[int]) -> bool:
    """Whether any text has ids: by all bytes on their own, or as the characters of byte-level BPE."""
    import tokenizers

    return len(by_bytes) == 256 or vocabulary.keys() >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _first_from(encoding: "tokenizers.Encoding", place: int) -> int:
    """The first token that begins at this character or later."""
    return next((i for i in range(len(encoding)) if _span(encoding, i)[0] >= place), len(encoding))


def _last_cut(encoding: "tokenizers.Encoding", most: int) -> tuple[int, int]:
    """The last token up to the character `most` that shares no character with the token before it, and its place."""
    for i in range(len(encoding) - 1, 0, -1):
        place = _span(encoding, i)[0]
        if place <= most and _is_cut(encoding, i, place):
            return i, place
    return 0, 0


def _is_cut(encoding: "tokenizers.Encoding", token: int, place: int) -> bool:
    """Whether this token begins at this character, and the one before it has ended."""
    return _span(encoding, token)[0] == place and (token == 0 or _span(encoding, token - 1)[1] <= place)


def _span(encoding: "tokenizers.Encoding", token: int) -> tuple[int, int]:
    """The first character of a token, and the one after its last."""
    return encoding.token_to_chars(token)  # type: ignore[return-value]  # encoding.offsets would list all
