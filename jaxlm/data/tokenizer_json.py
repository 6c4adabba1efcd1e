"""What a byte-pair encoding of the tokenizers library must hold before that library gets it.

The library is written in Rust. Where a tokenizer.json contradicts itself it panics, or takes memory by the largest id
until the process is aborted, which Python cannot catch.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.errors import UserError

SPARE = 1 << 20
"""Ids without a token, beyond three for each token, up to the largest id."""


def check_bpe(data: Mapping[str, Any]) -> None:
    """Refuses a tokenizer.json whose ids leave large gaps, or whose merges make tokens that it does not have.

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
    _check_merges(model, vocabulary)


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
