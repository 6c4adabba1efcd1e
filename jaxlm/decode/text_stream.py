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

    The work for a token does not grow with the text, nor with the stop strings. Only the latest tokens are decoded, and
    the new text is what the same tokens did not spell before the new one came. They are more than the new one alone,
    because a character may be spread over four tokens, and because some tokenizers drop the space before the first
    token they decode.

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
        self._decode, self._byte_tokens = decode, byte_tokens
        self._matches = [_Match(string) for string in stop_strings]
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
        if not self._matches:
            return piece
        text, held = self._held + piece, len(self._held)
        for end, character in enumerate(piece, held + 1):
            whole = [len(match.string) for match in self._matches if match.push(character)]
            if whole:  # the string that ends first stops the text; of several, the longest
                self.stopped, self._held = True, ""
                return text[: end - max(whole)]
        certain = len(text) - max(match.length for match in self._matches)
        self._held = text[certain:]
        return text[:certain]


class _Match:
    """How much of a string the end of a text spells, character by character.

    Source: Knuth, Morris and Pratt 1977, Fast pattern matching in strings, https://doi.org/10.1137/0206024.
    """

    def __init__(self, string: str) -> None:
        self.string, self.length = string, 0
        """length: of the longest end of the text that begins the string."""
        self._shorter = [0, 0]  # of a begin of each length, the longest shorter one that it ends with
        for character in string[1:]:
            self._shorter.append(self._extended(self._shorter[-1], character))

    def push(self, character: str) -> bool:
        """Adds a character; returns whether the text now ends with the whole string, after which none may follow."""
        self.length = self._extended(self.length, character)
        return self.length == len(self.string)

    def _extended(self, length: int, character: str) -> int:
        while length and self.string[length] != character:
            length = self._shorter[length]
        return length + (self.string[length] == character)
