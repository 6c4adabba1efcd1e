"""Text samples of a run: shown as their tokens come, cut before stop strings, and kept in the run's folder."""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlm import strict_json
from jaxlm.config import ExperimentConfig, ModelConfig, SampleConfig
from jaxlm.data.tokenizer import Tokenizer, prompt_ids
from jaxlm.decode.generate import generate_blocks
from jaxlm.decode.request import Request, make_request
from jaxlm.decode.stream import steps_until_stop
from jaxlm.decode.text_stream import TextStream
from jaxlm.errors import ContextWarning
from jaxlm.run.folder import Run
from jaxlm.run.own_files import own_problem


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


def sample_request(
    cfg: ModelConfig, tokenizer: Tokenizer, sampling: SampleConfig, capacity: int | None = None
) -> Request:
    """The checked request for the samples of a run: what training refuses before its first step, and sampling runs.

    Args:
      capacity: tokens that the cache holds, as `jaxlm.generate` takes it.

    Raises:
      UserError: as `generate_samples`.
    """
    stop_tokens = sampling.stop_tokens
    if sampling.stop_token is None and tokenizer.eos_token is not None:
        stop_tokens = (tokenizer.eos_token,)
    padding = () if tokenizer.pad_token is None else (tokenizer.pad_token,)
    without_text = range(tokenizer.vocab_size, cfg.vocab_size)
    forbidden = (*sampling.forbidden_tokens, *padding, *without_text)
    return make_request(
        cfg,
        prompt_ids(sampling.prompt, tokenizer, special_tokens=sampling.special_tokens)[None],
        dataclasses.replace(sampling, stop_token=stop_tokens, forbidden_tokens=forbidden),
        key=jax.random.key(sampling.seed),
        num_samples=sampling.num_samples,
        capacity=capacity,
    )


def prompt_fits(run: Run, cfg: SampleConfig) -> bool:
    """Whether the prompt of `cfg` is within the context of the model."""
    ids = prompt_ids(cfg.prompt, run.tokenizer, special_tokens=cfg.special_tokens)
    return len(ids) <= run.model.cfg.max_seq_len


def check_samples(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    """Refuses options of sampling that the model or its vocabulary rules out, before anything is trained.

    Raises:
      UserError: as `generate_samples`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)  # the sample warns, where its length is a choice
        sample_request(config.model, tokenizer, config.sample)


def generate_samples(
    run: Run, cfg: SampleConfig, show: Callable[[str], None] | None = None, capacity: int | None = None
) -> list[Sample]:
    """Continues the prompt of `cfg` `num_samples` times; `cfg` and the run decide every token.

    On transcripts <eos> precedes every prompt, an empty one too, <pad> is never generated, and the next <eos> ends a
    sample unless cfg.stop_token names others. Ids beyond those of the tokenizer are never generated.

    Args:
      show: called with the prompt, once everything is checked, and with each piece of the first sample as it comes.
      capacity: tokens that the cache holds, as `jaxlm.generate` takes it.

    Raises:
      UserError: a prompt that `prompt_ids` refuses, a value that `generate` refuses.
      CheckError: logits that are not finite.
    """
    tokenizer = run.tokenizer
    request = sample_request(run.model.cfg, tokenizer, cfg, capacity)
    prompt, stop_tokens = request.prompts.ids[0], tuple(np.flatnonzero(request.values.stops).tolist())
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

    Returns: the file; None, with a warning, where the folder cannot be written or is a link.
    """
    folder, content = run.path / "samples", strict_json.dumps(report, ensure_ascii=False) + "\n"
    if problem := own_problem(folder):
        warnings.warn(f"the samples are not kept: {folder} {problem}", stacklevel=2)
        return None
    try:
        folder.mkdir(exist_ok=True)
        for number in itertools.count(1):
            suffix = "" if number == 1 else f"-{number}"
            path = folder / f"step-{run.step}-seed-{seed}{suffix}.json"
            with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                file.write(content)
                return path
    except OSError as error:
        warnings.warn(f"the samples are not kept: {folder} cannot be written ({error.strerror or error})", stacklevel=2)
    return None
