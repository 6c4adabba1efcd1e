"""The tokens of a document of a prepared corpus: its text, what the tokenizer puts around it, and its end."""

import numpy as np
from jaxtyping import Int

from jaxlm.data.bpe import BPETokenizer

ENCODED_AT_ONCE = 1 << 18
"""Characters that the tokenizers library gets at once: what it says of a token takes far more space than its id."""


def special_ids(tokenizer: BPETokenizer) -> dict[str, int]:
    """The special tokens by their spelling. With special_tokens = "text" no text becomes one of them."""
    added = tokenizer.to_dict()["tokenizer"]["added_tokens"]
    return {token["content"]: token["id"] for token in added if token["special"]}


def cuts_at_spaces(tokenizer: BPETokenizer) -> bool:
    """Whether a text has the same ids in two parts, where a space or a line feed follows another character.

    It has them with the words of GPT-2 (none goes on with a space) and nothing put around a text.
    """
    data = tokenizer.to_dict()["tokenizer"]
    words = data["pre_tokenizer"] or {}
    plain = data["normalizer"] is None and all(token["special"] for token in data["added_tokens"])
    by_words = words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words["add_prefix_space"]
    return plain and by_words and not tokenizer.before and not tokenizer.after


def encode_document(tokenizer: BPETokenizer, text: str, end_of_text: int | None) -> Int[np.ndarray, " n"]:
    """The ids of a document, int32. What looks like a special token in its text is text.

    Args:
      end_of_text: the last id, which stands nowhere else; None = the document goes on (see `cuts_at_spaces`).
    """
    if len(text) <= ENCODED_AT_ONCE:
        ids = tokenizer.encode(text, "text")[len(tokenizer.before) :]
    else:
        blocks = (text[i : i + ENCODED_AT_ONCE] for i in range(0, len(text), ENCODED_AT_ONCE))
        whole = np.concatenate([*tokenizer.encode_blocks(blocks, "text")])
        ids = whole[len(tokenizer.before) : len(whole) - len(tokenizer.after)]
    before, after = ([i for i in part if i != end_of_text] for part in (tokenizer.before, tokenizer.after))
    end = [] if end_of_text is None else [end_of_text]
    return np.concatenate([np.array(before, np.int32), ids, np.array([*after, *end], np.int32)])


def document_bytes(tokenizer: BPETokenizer, end_of_text: int) -> Int[np.ndarray, " V"] | None:
    """Bytes of the text of a document that each id stands for; None if that is not known.

    The tokens around a text stand for none. A space that the tokenizer puts in front is taken back at the end; some
    (Metaspace) put none before a text that begins with one, and such a document counts one byte too few.
    """
    counts = tokenizer.token_bytes()
    if counts is None:
        return None
    one, two = (int(counts[tokenizer.encode(text)[len(tokenizer.before) :]].sum()) for text in ("x", "xx"))
    counts[[*tokenizer.before, *tokenizer.after]] = 0
    counts[end_of_text] = two - 2 * one
    return counts
