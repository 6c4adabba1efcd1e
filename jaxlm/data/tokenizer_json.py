"""What a byte-pair encoding of the tokenizers library must hold before that library gets it.

The library is written in Rust. Where a tokenizer.json contradicts itself it panics, or takes memory by the largest id
until the process is aborted, which Python cannot catch.
"""

import base64
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.errors import UserError

SPARE = 1 << 20
"""Ids without a token, beyond three for each token, up to the largest id."""

MOST_GROWTH = 64
"""How many times longer than a text what becomes of it may be; that of well-known models is below 54."""

LONGEST_AFFIX = 64
"""Characters of what a tokenizer puts before or behind each part of a word."""

MOST_AROUND = 1024
"""Tokens that a tokenizer puts around a text."""

_GROWTH = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 1.5, "BertNormalizer": 3},
    **{"ByteLevel": 2, "Metaspace": 2},
}
"""How many times longer a text becomes by a step at most; others than these and `_growth`'s make none longer."""


def check_bpe(data: Mapping[str, Any]) -> None:
    """Refuses a tokenizer.json whose ids leave large gaps, whose merges make tokens that it does not have, or by which
    a short text becomes a long one.

    Raises:
      UserError: the message names the entry.
    """
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vocabulary, Mapping):
        raise UserError("it has no model.vocab: give a whole tokenizer.json")
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(one, Mapping) and one.get("content") for one in added):
        raise UserError("its added_tokens are not a list of tokens with a content: give a whole tokenizer.json")
    ids = [*vocabulary.values(), *(one.get("id") for one in added)]
    most = 4 * len(ids) + SPARE
    for i in ids:
        if type(i) is not int or not 0 <= i < most:
            raise UserError(f"it has the id {i!r:.40} for a token: give whole numbers below {most}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(name) or "")) > LONGEST_AFFIX:
            raise UserError(f"its {name} has more than {LONGEST_AFFIX} characters: give a shorter one")
    _check_merges(model, vocabulary)
    _check_growth("normalizer and pre_tokenizer", [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))])
    _check_growth("decoder", _steps(data.get("decoder")))
    _check_growth("post_processor", _steps(data.get("post_processor")))


def _steps(step: Any) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer, one after another; what is no step is left to the library, which refuses."""
    if not isinstance(step, Mapping):
        return []
    inside = [step.get(name) for name in ("normalizers", "pretokenizers", "decoders", "processors")]
    return [step, *(one for part in inside if isinstance(part, list) for child in part for one in _steps(child))]


def _check_growth(part: str, steps: list[Mapping[str, Any]]) -> None:
    """Refuses steps that could make a text many times longer, each as much as it can on its own.

    Raises:
      UserError: the message names the part.
    """
    if not math.prod(map(_growth, steps)) <= MOST_GROWTH:
        raise UserError(
            f"its {part} can make a text more than {MOST_GROWTH} times longer: give a tokenizer without "
            "long replacements"
        )


def _growth(step: Mapping[str, Any]) -> float:
    kind, pattern, content = step.get("type"), step.get("pattern"), str(step.get("content") or "")
    if kind == "Replace":
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        return max(1, len(content) / len(text) if text and isinstance(text, str) else 1 + len(content))
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend") or ""))  # of each part of a text between two special tokens
    if kind == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        return _template_growth(step)
    return _GROWTH.get(str(kind), 1)


def _longest_replacement(charsmap: Any) -> int:
    """Characters of the longest text that SentencePiece's table of characters puts for one.

    It holds the length of a trie in four bytes, the trie, and texts that end with a 0 byte.
    """
    try:
        raw = base64.b64decode(charsmap)
    except (ValueError, TypeError):
        return 1  # the library refuses it
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))


def _template_growth(step: Mapping[str, Any]) -> int:
    """How often a template repeats a text; UserError if it puts too many tokens around it."""
    single, known = step.get("single"), step.get("special_tokens")
    pieces = [piece for piece in single if isinstance(piece, Mapping)] if isinstance(single, list) else []
    around = 0
    for piece in pieces:
        special = piece.get("SpecialToken")
        entry = known.get(special.get("id")) if isinstance(known, Mapping) and isinstance(special, Mapping) else None
        ids = entry.get("ids") if isinstance(entry, Mapping) else None
        around += len(ids) if isinstance(ids, list) else 0
    if around > MOST_AROUND:
        raise UserError(f"its post_processor puts {around:,} tokens around a text: give at most {MOST_AROUND:,}")
    return max(1, sum("Sequence" in piece for piece in pieces))


def _check_merges(model: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> None:
    merges, prefix = model.get("merges"), model.get("continuing_subword_prefix") or ""
    if not isinstance(merges, list) or not isinstance(prefix, str):
        raise UserError("it has no list model.merges: give a whole tokenizer.json")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise UserError(f"its merge {merge!r:.80} is not a pair of tokens: give a whole tokenizer.json")
        first, second = parts
        made = first + second[len(prefix) :]
        if not second.startswith(prefix) or not {first, second, made} <= vocabulary.keys():
            raise UserError(
                f"its merge {merge!r:.80} names a token that model.vocab lacks: give a whole tokenizer.json"
            )


@contextlib.contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Turns an error of the library, or a panic, which is no Exception, into a refusal; `what` begins its message.

    Raises:
      UserError: the library panicked or refused, for example since a pattern of the tokenizer backtracks without end.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or ["it panicked"])[0]
        raise UserError(f"{what} ({reason}): give another tokenizer") from None
