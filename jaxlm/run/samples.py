"""Text samples of a run: shown as their tokens come, cut before stop strings, and kept in the run's folder."""

import contextlib
import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm.config import SampleConfig
from jaxlm.data.tokenizer import prompt_ids
from jaxlm.decode.generate import generate_blocks
from jaxlm.decode.request import make_request
from jaxlm.decode.stream import steps_until_stop
from jaxlm.decode.text_stream import TextStream
from jaxlm.run.folder import Run


@dataclasses.dataclass(frozen=True)
class Sample:
    """What follows a prompt."""

    tokens: list[int]
    """The new tokens, without the stop token; those that spell a stop string are included."""
    log_probs: list[float]
    """Log-probability of each in nats, under the model itself (before temperature and filters)."""
    text: str
    """The text of the tokens, up to the first stop string."""
    finished: Literal["stop_token", "stop_string", "length"]
    """What ended it."""


def generate_samples(run: Run, cfg: SampleConfig, show: Callable[[str], None] | None = None) -> list[Sample]:
    """Continues the prompt of `cfg` `num_samples` times; `cfg` and the run decide every token.

    On transcripts <eos> precedes every prompt, an empty one too, <pad> is never generated, and the next <eos> ends a
    sample unless cfg.stop_token names others. Ids beyond those of the tokenizer are never generated.

    Args:
      show: called with the prompt, once everything is checked, and with each piece of the first sample as it comes.

    Raises:
      UserError: a prompt that `prompt_ids` refuses, a value that `generate` refuses.
    """
    tokenizer = run.tokenizer
    stop_tokens = cfg.stop_tokens
    if cfg.stop_token is None and tokenizer.eos_token is not None:
        stop_tokens = (tokenizer.eos_token,)
    padding = () if tokenizer.pad_token is None else (tokenizer.pad_token,)
    without_text = range(tokenizer.vocab_size, run.model.cfg.vocab_size)
    forbidden = (*cfg.forbidden_tokens, *padding, *without_text)
    prompt = prompt_ids(cfg.prompt, tokenizer, special_tokens=cfg.special_tokens)
    request = make_request(
        run.model.cfg,
        prompt[None],
        dataclasses.replace(cfg, stop_token=stop_tokens, forbidden_tokens=forbidden),
        key=jax.random.key(cfg.seed),
        num_samples=cfg.num_samples,
    )
    if show is not None:
        show(cfg.prompt)
    texts = [
        TextStream(tokenizer.decode, cfg.stop, tokenizer.byte_tokens, prompt.tolist()) for _ in range(cfg.num_samples)
    ]
    rows = [_Row(text) for text in texts]
    blocks = generate_blocks(run.model, run.params, request, 1)
    for step in steps_until_stop(blocks, stop_tokens, texts):
        for row, token, log_prob, piece in zip(
            rows, step.tokens.tolist(), step.log_probs.tolist(), step.pieces, strict=True
        ):
            row.add(token, log_prob, piece, stop_tokens)
        if show is not None and step.pieces[0]:
            show(step.pieces[0])
    for row in rows:
        row.pieces.append(row.text_stream.finish())
        if row.text_stream.stopped:  # also by bytes that no later ones have completed
            row.finished = "stop_string"
    if show is not None and rows[0].pieces[-1]:
        show(rows[0].pieces[-1])
    return [Sample(row.tokens, row.log_probs, "".join(row.pieces), row.finished) for row in rows]


@dataclasses.dataclass
class _Row:
    """A sample that is not complete yet."""

    text_stream: TextStream
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    pieces: list[str] = dataclasses.field(default_factory=list)
    finished: Literal["stop_token", "stop_string", "length"] = "length"

    def add(self, token: int, log_prob: float, piece: str, stop_tokens: tuple[int, ...]) -> None:
        """Adds the next token, unless the sample has ended."""
        if self.finished != "length":
            return
        if token in stop_tokens:
            self.finished = "stop_token"
            return
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        self.pieces.append(piece)
        if self.text_stream.stopped:
            self.finished = "stop_string"


def sample(run: Run, cfg: SampleConfig) -> list[str]:
    """The texts of `generate_samples`, prompt included.

    Raises:
      UserError: as `generate_samples`.
    """
    return [cfg.prompt + one.text for one in generate_samples(run, cfg)]


def keep(run: Run, seed: int, report: dict[str, Any]) -> Path | None:
    """Writes a report of samples to a new file samples/step-STEP-seed-SEED[-n].json of the run.

    Returns: the file; None, with a warning, where the folder cannot be written.
    """
    folder, content = run.path / "samples", json.dumps(report, ensure_ascii=False) + "\n"
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
