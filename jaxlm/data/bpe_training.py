"""Learning byte-pair encodings: words of bounded length, progress on stderr, and an end as soon as one asks for it."""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers  # where it is not needed, a command starts without it

WORD_BYTES = 256
"""Merges are learned from words of at most so many bytes; longer ones count as several.

The trainer takes time quadratic in the length of a word: 400,000 letters without a space took 37 s as one word and take
0.6 s in pieces. Texts whose words are shorter give the same merges as without a limit."""

HELD_CHARS = 1 << 16
"""The trainer gets about so many characters at a time, and holds 256 times as many; a longer text without an end of a
word is cut."""

LINE_SECONDS = 5.0
"""So many seconds lie between two lines of progress where stderr is no terminal."""

LAST_SECONDS = 0.2
"""After an interruption, the trainer gets so much time to notice that there is no more text."""


def learn_merges(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str], announce: bool = True
) -> "tokenizers.Tokenizer":
    """Byte-level BPE as in GPT-2, with the special tokens as its first ids.

    The library computes in a thread of its own, because a signal is handled by Python between two of its instructions
    alone: Ctrl-C ends this call at once, and the thread with the process or with the next text.

    Args:
      announce: show progress on stderr: bars on a terminal, a line every few seconds elsewhere.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The limit is one of training alone: a text is encoded in whole words.
    pieces = tokenizers.pre_tokenizers.FixedLength(length=WORD_BYTES)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, pieces])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    on_terminal = announce and sys.stderr is not None and sys.stderr.isatty()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=on_terminal,
        special_tokens=special_tokens,
    )
    failures: list[BaseException] = []
    characters, is_read, is_over = 0, False, False

    def counted() -> Iterator[str]:
        nonlocal characters, is_read
        for text in texts:
            if is_over:
                return
            characters += len(text)
            yield text
        is_read = True

    def work() -> None:
        try:
            tokenizer.train_from_iterator(counted(), trainer)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="learning BPE", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LINE_SECONDS)
            if thread.is_alive() and announce and not on_terminal:
                done = f"{characters:,} characters read" + ", counting and merging" * is_read
                print(f"learning {vocab_size:,} BPE tokens: {done}", file=sys.stderr)
    except BaseException:
        is_over = True
        thread.join(LAST_SECONDS)
        raise
    if failures:
        raise failures[0]
    tokenizer.pre_tokenizer = words
    return tokenizer


def whole_words(blocks: Iterable[str]) -> Iterator[str]:
    """A text in blocks of about HELD_CHARS characters; none ends within a word, but for words that are longer."""
    text = ""
    for part in (block[i : i + HELD_CHARS] for block in blocks for i in range(0, len(block), HELD_CHARS)):
        seen = len(text)  # no word ends before this place
        text += part
        ends = (i for i in range(len(text) - 1, max(seen, 1) - 1, -1) if text[i] in " \n" and text[i - 1].isalnum())
        end = next(ends, 0) or (len(text) if len(text) > HELD_CHARS else 0)
        if end:
            yield text[:end]
            text = text[end:]
    yield text
