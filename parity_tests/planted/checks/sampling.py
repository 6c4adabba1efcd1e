"""Sampling against transformers' logits processors: which tokens stay, and then whole draws of a model.

A draw is that of `jax.random.categorical` with fold_in(fold_in(key, row), step), so the reference adds the Gumbel noise
of that key to the logits that transformers leaves of torchref's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.generation import logits_process as theirs

import torchref
from jaxlm.config import ModelConfig, SamplingParams
from jaxlm.convert import to_torchref
from jaxlm.convert.tensors import to_tensor
from jaxlm.decode.filters import FilterFlags, FilterValues, sample_token
from jaxlm.decode.generate import generate
from jaxlm.model.build import build_model
from jaxlm.parity import Report, random_params
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import computing
from jaxlm.parity.report import Divergence

ROWS, VOCABULARY, LARGE = 30, 19, 1e9
NEW, KEY, LENGTHS = 12, 5, (5, 3, 1)
HINTS = {
    "penalty": "positive logits are divided by the penalty, negative ones multiplied",
    "top-k": "top-k off by one",
    "top-p": "the token that crosses top_p stays",
    "min-p": "min_p is a share of the likeliest token's probability",
    "order": "temperature first, then top-k, top-p of what is left, min-p",
    "greedy": "of equal logits the first is chosen",
    "tokens": "the noise of a row and step; the penalty on the prompt; rows that are done",
    "lengths": "the stop token is not counted",
    "log-probabilities": "those of the model itself, before temperature and filters",
}
Kept = np.ndarray


class Stage(NamedTuple):
    """Some options, and the processors of transformers that do the same."""

    place: str
    options: dict[str, Any]
    processors: list[Any]
    traps: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}  # noqa: RUF012
    """Wrong filters: what each leaves of the logits."""


def check_sampling(cfg: ModelConfig) -> Report:
    """Compares the tokens that each option leaves, then tokens, lengths and log-probabilities of `generate`."""
    rows: list[Row] = []
    for stage in _stages():
        found, expected = _kept(stage)
        rows.append(measure("decoding", stage.place, [Results(found, expected)], "float64"))
        if not rows[-1].passed:
            row = int(np.argmax((found != expected).any(axis=1)))
            where = f"of row {row} the tokens {np.flatnonzero(found[row]).tolist()} may be drawn, not "
            where += f"{np.flatnonzero(expected[row]).tolist()}, with {stage.options}"
            tried = [f"{words} (tried)" for words, kept in _trapped(stage) if np.array_equal(kept, found)]
            return Report(tuple(rows), _divergence(stage.place, where, tried))
    with computing("float64"):
        params = random_params(cfg)
        head = params["head"]
        # No token is certain, and that which stands for padding is likely.
        params = {**params, "head": {"kernel": 5 * head["kernel"], "bias": head["bias"].at[0].add(3)}}
        sampling = _sampling(cfg, params)
        found_all, expected_all = _drawn(cfg, params, sampling), _reference(cfg, params, sampling)
    for place, ours, wanted in zip(("tokens", "lengths", "log-probabilities"), found_all, expected_all, strict=True):
        rows.append(measure("decoding", place, [Results(ours, wanted)], "float64"))
        if not rows[-1].passed:
            at = np.argwhere(np.abs(ours - wanted) > 1e-10)[0].tolist()
            where = f"{place} differ first in row {at[0]}" + (f", step {at[1]}" if len(at) > 1 else "")
            with computing("float64"):
                tried = [f"{words} (tried)" for words in _explains(cfg, params, sampling, place, ours)]
            return Report(tuple(rows), _divergence(place, where, tried))
    return Report(tuple(rows))


def _divergence(place: str, where: str, tried: list[str]) -> Divergence:
    return Divergence("sampling", place, True, where, (*tried, HINTS[place]))


# Filters


def _stages() -> list[Stage]:
    warm, sharp = theirs.TemperatureLogitsWarper(2.5), theirs.TemperatureLogitsWarper(0.4)
    penalty = theirs.RepetitionPenaltyLogitsProcessor(1.8)

    def top_k(k: int) -> Any:
        return lambda logits: theirs.TopKLogitsWarper(k)(_seen(), logits)

    def penalised(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """The top 9 of logits of which those seen are changed."""

        def kept(logits: torch.Tensor) -> torch.Tensor:
            changed = logits.scatter(1, _seen(), change(logits.gather(1, _seen())))
            return theirs.TopKLogitsWarper(9)(_seen(), changed)

        return kept

    return [
        Stage("greedy", {"temperature": 0.0}, [_greedy], {"of equal logits the last is chosen": _greedy_last}),
        Stage(
            "top-k",
            {"top_k": 5},
            [theirs.TopKLogitsWarper(5)],
            {"one token too many": top_k(6), "one token too few": top_k(4)},
        ),
        Stage(
            "penalty",
            {"top_k": 9, "repetition_penalty": 1.8},
            [penalty, theirs.TopKLogitsWarper(9)],
            {
                "negative logits divided too": penalised(lambda x: x / 1.8),
                "logits multiplied by the penalty where they should be divided": penalised(
                    lambda x: torch.where(x > 0, x * 1.8, x / 1.8)
                ),
            },
        ),
        Stage(
            "top-p", {"top_p": 0.6}, [theirs.TopPLogitsWarper(0.6)], {"the token that crosses top_p left out": _below}
        ),
        Stage(
            "min-p",
            {"min_p": 0.15},
            [theirs.MinPLogitsWarper(0.15)],
            {"min_p taken as a probability": lambda x: _only(x, x.softmax(-1) >= 0.15)},
        ),
        Stage(
            "order",
            {"temperature": 2.5, "top_p": 0.6},
            [warm, theirs.TopPLogitsWarper(0.6)],
            {"temperature after the filters": lambda x: theirs.TopPLogitsWarper(0.6)(_seen(), x)},
        ),
        Stage(
            "order",
            {"temperature": 0.4, "min_p": 0.15},
            [sharp, theirs.MinPLogitsWarper(0.15)],
            {"temperature after the filters": lambda x: theirs.MinPLogitsWarper(0.15)(_seen(), x)},
        ),
        Stage(
            "order",
            {"top_k": 4, "top_p": 0.7},
            [theirs.TopKLogitsWarper(4), theirs.TopPLogitsWarper(0.7)],
            {"top_p not of what top_k leaves, but of all": _top_p_of_all},
        ),
    ]


def _kept(stage: Stage) -> tuple[Kept, Kept]:
    """Which tokens can be drawn, [ROWS, V]: those that a huge noise brings about, those that transformers leaves."""
    logits, seen = _logits(stage.place), np.zeros((ROWS, VOCABULARY), bool)
    seen[np.arange(ROWS)[:, None], _seen().numpy()] = True
    params = SamplingParams(max_new_tokens=1, **stage.options)
    flags, values = FilterFlags.of(params, VOCABULARY), FilterValues.of(params, VOCABULARY)
    with computing("float64"):
        each, was_seen = (jnp.asarray(np.repeat(x, VOCABULARY, axis=0)) for x in (logits.numpy(), seen))
        noise = None if flags.greedy else jnp.asarray(np.tile(LARGE * np.eye(VOCABULARY), (ROWS, 1)))
        tokens = np.asarray(sample_token(each, noise, was_seen, flags, values))
    for processor in stage.processors:
        logits = processor(_seen(), logits)
    return tokens.reshape(ROWS, VOCABULARY) == np.arange(VOCABULARY), logits.isfinite().numpy()


def _trapped(stage: Stage) -> list[tuple[str, Kept]]:
    return [(words, trap(_logits(stage.place)).isfinite().numpy()) for words, trap in stage.traps.items()]


def _logits(place: str = "") -> torch.Tensor:
    """Random logits; for the greedy choice two tokens are the likeliest of some rows."""
    logits = 1.5 * torch.randn(ROWS, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if place == "greedy":
        logits[::3, [3, 11]] = 6.0
    return logits


def _seen() -> torch.Tensor:
    """Tokens of each row's past: likely ones, and some below which the penalty pushes them or lifts them."""
    return _logits().argsort(dim=1)[:, [18, 15, 10, 8, 7, 0]]


def _only(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~kept, -np.inf)


def _greedy(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    best = torch.from_numpy(logits.numpy().argmax(axis=1))  # NumPy takes the first of equals, torch any
    return _only(logits, torch.nn.functional.one_hot(best, VOCABULARY).bool())


def _greedy_last(logits: torch.Tensor) -> torch.Tensor:
    return _greedy(_seen(), logits.flip(1)).flip(1)


def _before(logits: torch.Tensor) -> torch.Tensor:
    """For each token, the probability of those likelier."""
    probs = logits.softmax(-1)
    order = probs.argsort(dim=-1, descending=True, stable=True)
    sums = probs.gather(1, order).cumsum(-1) - probs.gather(1, order)
    return torch.empty_like(sums).scatter(1, order, sums)


def _below(logits: torch.Tensor) -> torch.Tensor:
    before = _before(logits)
    return _only(logits, (before + logits.softmax(-1) < 0.6) | (before == 0))


def _top_p_of_all(logits: torch.Tensor) -> torch.Tensor:
    return _only(theirs.TopKLogitsWarper(4)(_seen(), logits), _before(logits) < 0.7)


# Whole draws


def _sampling(cfg: ModelConfig, params: Any) -> dict[str, Any]:
    """Options under which one row stops early and another does not."""
    options = {"temperature": 1.3, "top_k": 11, "repetition_penalty": 3.0, "stop_token": None}
    tokens = _reference(cfg, params, options)[0]
    places = {token: np.where(tokens == token, np.arange(NEW), NEW).min(axis=1) for token in range(cfg.vocab_size)}
    return options | {"stop_token": next(t for t, at in places.items() if 2 <= at.min() <= 5 and at.max() == NEW)}


def _prompt(cfg: ModelConfig) -> np.ndarray:
    return np.random.default_rng(3).integers(1, cfg.vocab_size, (len(LENGTHS), max(LENGTHS))).astype(np.int32)


def _drawn(cfg: ModelConfig, params: Any, sampling: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn = generate(
        build_model(cfg),
        params,
        _prompt(cfg),
        max_new_tokens=NEW,
        key=jax.random.key(KEY),
        prompt_lengths=LENGTHS,
        **sampling,
    )
    return np.asarray(drawn.tokens), np.asarray(drawn.lengths), np.asarray(drawn.log_probs)


@dataclasses.dataclass(frozen=True)
class Trap:
    """What a sampler may do wrong."""

    noise_of_row: int | None = None
    noise_of_step: int | None = None
    prompt_is_penalised: bool = True
    padding_is_penalised: bool = False
    new_tokens_are_penalised: bool = True
    done_rows_stop: bool = True
    stop_is_counted: bool = False
    log_probs_of: str = "logits"


def _explains(cfg: ModelConfig, params: Any, sampling: dict[str, Any], place: str, found: np.ndarray) -> list[str]:
    traps = {
        "one noise for all rows": Trap(noise_of_row=0),
        "one noise for all steps": Trap(noise_of_step=0),
        "the prompt is not penalised": Trap(prompt_is_penalised=False),
        "the padding of prompts is penalised": Trap(padding_is_penalised=True),
        "new tokens are not penalised": Trap(new_tokens_are_penalised=False),
        "rows go on after their stop token": Trap(done_rows_stop=False),
        "the stop token is counted": Trap(stop_is_counted=True),
        "log-probabilities after the temperature": Trap(log_probs_of="tempered"),
        "log-probabilities after all filters": Trap(log_probs_of="scores"),
    }
    of = ("tokens", "lengths", "log-probabilities").index(place)
    return [
        words
        for words, trap in traps.items()
        if measure("decoding", "", [Results(found, _reference(cfg, params, sampling, trap)[of])], "float64").passed
    ]


@torch.no_grad()
def _reference(
    cfg: ModelConfig, params: Any, sampling: dict[str, Any], trap: Trap = Trap()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [R, n], lengths [R] and log-probabilities [R, n], row by row from the whole history."""
    network = torchref.build_model(cfg).eval()
    network.load_state_dict(to_torchref(cfg, params))
    tokens, log_probs = np.zeros((len(LENGTHS), NEW), int), np.zeros((len(LENGTHS), NEW))
    stop, tempered = sampling["stop_token"], theirs.TemperatureLogitsWarper(sampling["temperature"])
    filters = [tempered, theirs.TopKLogitsWarper(sampling["top_k"])]
    penalty = theirs.RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"])
    lengths = np.full(len(LENGTHS), NEW)
    for row, (prompt, real) in enumerate(zip(_prompt(cfg), LENGTHS, strict=True)):
        history, done = prompt[:real].tolist(), False
        row_key = jax.random.fold_in(jax.random.key(KEY), row if trap.noise_of_row is None else trap.noise_of_row)
        for step in range(NEW):
            if done and trap.done_rows_stop:
                tokens[row, step] = stop
                continue
            logits = network(to_tensor(np.array([history])))[:, -1]
            past = history[:real] * trap.prompt_is_penalised + history[real:] * trap.new_tokens_are_penalised
            past += [0] * (trap.padding_is_penalised and real < len(prompt))
            scores = penalty(torch.tensor([past], dtype=torch.long), logits)
            for change in filters:
                scores = change(None, scores)
            at = step if trap.noise_of_step is None else trap.noise_of_step
            noise = jax.random.gumbel(jax.random.fold_in(row_key, at), (cfg.vocab_size,), "float64")
            token = int((scores[0].numpy() + np.asarray(noise)).argmax())
            history.append(token)
            tokens[row, step] = token
            if not done:
                of = {"logits": logits, "tempered": tempered(None, logits), "scores": scores}[trap.log_probs_of]
                log_probs[row, step] = of.log_softmax(-1)[0, token]
            if token == stop and not done:
                done, lengths[row] = True, step + trap.stop_is_counted
    return tokens, lengths, log_probs
