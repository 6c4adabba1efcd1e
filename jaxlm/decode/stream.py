"""Tokens as they come, and rows that end with a stop string."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.decode.generate import generate_blocks
from jaxlm.decode.generation import TokenBlock
from jaxlm.decode.request import request_from
from jaxlm.decode.text_stream import TextStream
from jaxlm.errors import UserError
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens


class Step(NamedTuple):
    """One new token of every row.

    tokens: [R] token ids; a row that is done has the stop token, or -1 where there is none.
    log_probs: [R] log-probability of each in nats under the model itself; 0 where the row is done.
    pieces: [R] text that this token makes certain; "" where the row is done.
    """

    tokens: Int[np.ndarray, " R"]
    log_probs: Float[np.ndarray, " R"]
    pieces: list[str]


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

    A row is done after a stop token, or after the token with which its new text contains a stop string; from then on it
    holds the smallest stop token, or -1 where there is none. Tokens come in scans of up to 8 steps.

    Args:
      stop_strings: texts that end a row; the last token may reach beyond one.
      tokenizer: turns tokens into text, by its `decode`; needed for stop strings.
      arguments: those of `generate`, with its meaning and errors.

    Raises:
      UserError: as `generate`; stop strings without a tokenizer, or an empty one.
    """
    request = request_from(model.cfg, prompt, **arguments)
    texts: list[TextStream] = []
    if stop_strings:
        if tokenizer is None or "" in stop_strings:
            raise UserError(f"stop_strings = {list(stop_strings)!r}: give a tokenizer, and no empty string")
        texts = [
            TextStream(tokenizer.decode, stop_strings, tokenizer.byte_tokens, ids[:length].tolist())
            for ids, length in zip(request.prompts.ids, request.prompts.lengths, strict=True)
            for _ in range(request.prompts.num_samples)
        ]
    blocks = generate_blocks(model, params, request, 1)
    stop_tokens = np.flatnonzero(request.values.stops).tolist()
    return (step.tokens for step in steps_until_stop(blocks, stop_tokens, texts))


def steps_until_stop(
    blocks: Iterable[TokenBlock], stop_tokens: Sequence[int], texts: Sequence[TextStream] = ()
) -> Iterator[Step]:
    """The blocks step by step, until every row has a stop token or a stop string.

    Args:
      stop_tokens: ids that end a row.
      texts: the text of each row, which knows its stop strings; none = no stop strings, and no pieces.
    """
    fill = min(stop_tokens, default=-1)
    done, last = np.array(False), np.array(fill)
    for block in blocks:
        for tokens, log_probs in zip(block.tokens.T, block.log_probs.T, strict=True):
            tokens, log_probs = np.where(done, last, tokens), np.where(done, 0, log_probs)
            at_stop_token = np.isin(tokens, (*stop_tokens, fill))  # as every row is that is done
            pieces = [""] * len(tokens)
            for row, text in enumerate(texts):
                if not at_stop_token[row]:
                    pieces[row] = text.push(int(tokens[row]))
            yield Step(tokens, log_probs, pieces)
            stopped = np.array([text.stopped for text in texts] or False)
            done, last = at_stop_token | stopped, np.where(stopped, fill, tokens)
            if done.all():
                return
