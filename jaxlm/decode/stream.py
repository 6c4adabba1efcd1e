"""Tokens as they come, and rows that end with a string."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decode.generate import blocks
from jaxlm.decode.request import Block, Request
from jaxlm.errors import UserError
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens


def stream(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    *,
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    **arguments: Any,
) -> Iterator[Int[np.ndarray, " R"]]:
    """The tokens of `generate`, one [R] array a step, as they come; it ends when every row is done.

    A row is done after its stop token, or after the token with which its new text contains a stop string; it then
    holds the stop token, or -1 where there is none. Tokens come in scans of up to 8 steps.

    Args:
      stop_strings: texts that end a row; the last token may reach beyond one.
      tokenizer: whose `decode` makes texts of tokens; needed for stop strings.
      arguments: those of `generate`, with its meaning and errors.

    Raises:
      UserError: as `generate`; stop strings without a tokenizer, or an empty one.
    """
    request = Request(model.cfg, prompt, **arguments)
    if stop_strings and (tokenizer is None or "" in stop_strings):
        raise UserError(f"stop_strings = {list(stop_strings)!r}: give a tokenizer, and no empty string")
    parts = blocks(model, params, request, 1)
    return (tokens for tokens, _ in until_strings(request, parts, stop_strings, tokenizer))


def until_strings(
    request: Request, parts: Iterable[Block], stop_strings: Sequence[str], tokenizer: Tokenizer | None
) -> Iterator[tuple[Int[np.ndarray, " R"], Float[np.ndarray, " R"]]]:
    """Each step's tokens and log-probabilities, rows ended by stop strings as by the stop token."""
    stop = int(request.settings.stop_token)
    done = np.zeros(request.rows, bool)
    drawn: list[list[int]] = [[] for _ in range(request.rows)]
    for part in parts:
        for tokens, log_probs in zip(part.tokens.T, part.log_probs.T, strict=True):
            tokens, log_probs = np.where(done, stop, tokens), np.where(done, 0, log_probs)
            yield tokens, log_probs
            done = done | (tokens == stop)
            if stop_strings and tokenizer is not None:
                for row in np.flatnonzero(~done):
                    drawn[row].append(int(tokens[row]))
                    text = tokenizer.decode(drawn[row])
                    done[row] = any(string in text for string in stop_strings)
            if done.all():
                return
