"""Texts from a run: drawn token by token, shown as they come, cut before stop strings, and kept in its folder."""

import contextlib
import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm.config import SampleConfig
from jaxlm.data.tokenizer import Tokenizer, prompt_ids
from jaxlm.decode.generate import blocks
from jaxlm.decode.request import Request
from jaxlm.decode.stream import until_strings
from jaxlm.run.folder import Run

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What `decode` makes of the first bytes of a character whose others are still to come."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was drawn after a prompt."""

    tokens: list[int]
    """The new tokens, the stop token left out; those that spell a stop string are here."""
    log_probs: list[float]
    """Of each of them, in nats, under the model itself (before temperature and filters)."""
    text: str
    """What they spell, up to the first stop string."""
    finished: Literal["stop_token", "stop_string", "length"]
    """What ended it."""


class TextStream:
    """The text of tokens that come one at a time: each piece as soon as no later token can change it.

    All pieces together are `decode` of all tokens, up to the stop string that is whole first. Held back are the bytes
    of a character that is not whole yet, and an end that may begin a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string has come; nothing follows it."""
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._tokens: list[int] = []  # since the last boundary between characters
        self._given = 0  # characters of theirs that have been passed on
        self._held = ""

    def push(self, token: int) -> str:
        """Adds a token; the text that is now certain."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        certain = len(text) - text.endswith(UNFINISHED)
        piece, self._given = text[self._given : certain], certain
        if certain == len(text):
            self._tokens, self._given = [], 0
        return self._until_stop(piece)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        rest = self._until_stop(self._tokenizer.decode(self._tokens)[self._given :])
        self._tokens, self._given = [], 0
        held, self._held = self._held, ""
        return rest + held

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(string), at) for string in self._stop_strings if (at := text.find(string)) >= 0]
        self.stopped = bool(found)
        certain = min(found)[1] if found else len(text) - self._unsure(text)
        self._held = "" if found else text[certain:]
        return text[:certain]

    def _unsure(self, text: str) -> int:
        """Characters of the longest end of a text that begins a stop string."""
        lengths = (n for string in self._stop_strings for n in range(1, len(string)) if text.endswith(string[:n]))
        return max(lengths, default=0)


def draw(run: Run, cfg: SampleConfig, show: Callable[[str], None] | None = None) -> list[Sample]:
    """Continues the prompt of `cfg`, which decides every token, `num_samples` times.

    On transcripts <eos> precedes the prompt, whatever it is, the next <eos> ends a sample, and <pad> is never drawn.
    Nor is an id beyond those of the tokenizer.

    Args:
      show: called with the prompt, once everything is checked, and with each piece of the first sample as it comes.

    Raises:
      UserError: a prompt that `prompt_ids` refuses, a value that `generate` refuses.
    """
    made = run.tokenizer
    padding = () if made.pad_token is None else (made.pad_token,)
    nameless = range(made.vocab_size, run.model.cfg.vocab_size)
    request = Request(
        run.model.cfg,
        prompt_ids(cfg.prompt, made)[None],
        max_new_tokens=cfg.max_new_tokens,
        key=jax.random.key(cfg.seed),
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        num_samples=cfg.num_samples,
        stop_token=made.eos_token,
        forbidden_tokens=(*cfg.forbidden_tokens, *padding, *nameless),
    )
    if show is not None:
        show(cfg.prompt)
    rows = [_Row(TextStream(made, cfg.stop), show if number == 0 else None) for number in range(cfg.num_samples)]
    for tokens, log_probs in until_strings(request, blocks(run.model, run.params, request, 1), cfg.stop, made):
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.add(token, log_prob, made.eos_token)
    return [row.sample() for row in rows]


class _Row:
    """A sample in the making."""

    def __init__(self, stream: TextStream, show: Callable[[str], None] | None) -> None:
        self._stream, self._show = stream, show
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._pieces: list[str] = []
        self._at_stop_token = False

    def add(self, token: int, log_prob: float, stop_token: int | None) -> None:
        if self._stream.stopped or self._at_stop_token or token < 0:  # -1: ended, and there is no stop token
            return
        self._at_stop_token = token == stop_token
        if not self._at_stop_token:
            self._tokens.append(token)
            self._log_probs.append(log_prob)
            self._take(self._stream.push(token))

    def sample(self) -> Sample:
        self._take(self._stream.finish())
        by_token: Literal["stop_token", "length"] = "stop_token" if self._at_stop_token else "length"
        finished: Literal["stop_token", "stop_string", "length"] = "stop_string" if self._stream.stopped else by_token
        return Sample(self._tokens, self._log_probs, "".join(self._pieces), finished)

    def _take(self, piece: str) -> None:
        self._pieces.append(piece)
        if piece and self._show is not None:
            self._show(piece)


def sample(run: Run, cfg: SampleConfig) -> list[str]:
    """The texts of `draw`, prompt included.

    Raises:
      UserError: as `draw`.
    """
    return [cfg.prompt + drawn.text for drawn in draw(run, cfg)]


def keep(run: Run, seed: int, found: dict[str, Any]) -> Path | None:
    """Writes what was drawn to a new file samples/step-STEP-seed-SEED[-n].json of the run.

    Returns: the file; None, with a warning, where the folder cannot be written.
    """
    folder, content = run.path / "samples", json.dumps(found, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(exist_ok=True)
        for number in itertools.count(1):
            suffix = "" if number == 1 else f"-{number}"
            path = folder / f"step-{run.step}-seed-{seed}{suffix}.json"
            with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                file.write(content)
                return path
    except OSError as error:
        warnings.warn(f"the samples are not kept: {folder} cannot be written ({error.strerror})", stacklevel=2)
    return None
