"""The text of tokens that come one at a time, up to a stop string."""

from collections.abc import Callable, Container, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What `decode` makes of the first bytes of a character whose last bytes are still to come."""
CONTEXT, WINDOW = 8, 16
"""Tokens that are decoded again with each new one: at least so many, at most so many."""


class TextStream:
    """The text of one row of tokens: each piece as soon as no later token can change it.

    All pieces together are what `decode` of all tokens adds to that of the prompt, up to the stop string that is
    complete first. Two things are held back: the bytes of a character that is not complete yet, and an end of the text
    that may begin a stop string. Of `byte_tokens` all that follow one another are held back together.

    The work for a token does not grow with the text. Only the latest tokens are decoded, and the new text is what
    the same tokens did not spell before the new one came. They are more than the new one alone, because a character may
    be spread over four tokens, and because some tokenizers drop the space before the first token they decode.

    Args:
      decode: the tokenizer's, from token ids to text.
      byte_tokens: the tokenizer's.
      prompt: tokens before the first, whose text is complete.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop_strings: Sequence[str] = (),
        byte_tokens: Container[int] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.stopped = False
        """Whether a stop string is complete; nothing follows it."""
        self._decode, self._stop_strings, self._byte_tokens = decode, stop_strings, byte_tokens
        # A prompt's last bytes are a text of their own: wrong ones that follow must not spoil them.
        length = next((n for n in range(len(prompt), 0, -1) if prompt[n - 1] not in byte_tokens), len(prompt))
        self._window = list(prompt[max(length - CONTEXT, 0) : length])
        self._passed = self._decode_window()[
            1
        ]  # characters of the window's text that are certain, and passed on to the search for strings
        self._held = ""  # an end of what was passed on that may begin a stop string

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain."""
        self._window.append(token)
        if token in self._byte_tokens:
            return ""
        text, certain = self._decode_window()
        piece, self._passed = text[self._passed : certain], certain
        if len(self._window) >= WINDOW:
            del self._window[:-CONTEXT]
            self._passed = self._decode_window()[1]
        return self._until_stop(piece)

    def finish(self) -> str:
        """The text that was held back, once no token follows."""
        rest = self._until_stop(self._decode_window()[0][self._passed :])
        self._window, self._passed = [], 0
        held, self._held = self._held, ""
        return rest + held

    def _decode_window(self) -> tuple[str, int]:
        """The window's text, and how many of its characters no later token can change."""
        text = self._decode(self._window)
        return text, len(text) - text.endswith(UNFINISHED)

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        # (end, start) of each stop string's first place: the one that ends first stops the text.
        places = [(at + len(string), at) for string in self._stop_strings if (at := text.find(string)) >= 0]
        self.stopped = bool(places)
        if self.stopped:
            self._held = ""
            return text[: min(places)[1]]
        certain = len(text) - self._begun(text)
        self._held = text[certain:]
        return text[:certain]

    def _begun(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (n for string in self._stop_strings for n in range(1, len(string)) if text.endswith(string[:n]))
        return max(lengths, default=0)
