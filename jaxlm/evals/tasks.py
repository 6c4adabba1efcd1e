"""The language-model tasks of CMU's 11-785, on held-out data: prediction, generation, likelihood.

Rows are the held-out transcripts, each beginning with <eos>, or prompts of a file. A run on text has no transcripts:
its validation tokens are cut into rows, without <eos>, and "characters" below are tokens.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxlm.config import SamplingParams
from jaxlm.config.base import to_dict
from jaxlm.config.sampling import MIN_TEMPERATURE
from jaxlm.data.files import check_new_npz, staged
from jaxlm.decode.beam_search import beam_search
from jaxlm.decode.generate import generate, predict
from jaxlm.errors import UserError
from jaxlm.evals.calibration import fit_temperature
from jaxlm.evals.rows import held_out, held_out_rows, read_rows, symbols, training_rows
from jaxlm.evals.scorers import Scorer, batches, load_scorer, row_log_probs
from jaxlm.ops.loss import target_log_probs
from jaxlm.run.folder import Run

PREDICTION_PROMPT, PREDICTED = 30, 10
FIT_ROWS = 1000
"""Rows that a temperature is fitted on; more change the score by less than 0.002 (docs/log.md)."""
GENERATION_PROMPT = 40
EXAMPLES = 5


def prediction(
    run: Run,
    limit: int | None = None,
    batch_size: int = 64,
    *,
    temperature: float | Literal["fit"] | None = None,
    prompts: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """How well `jaxlm.predict` continues the first 30 characters of each row by the next 10.

    Its logits see its own greedy choices, not the true characters. Rows are the transcripts of at least 40 characters;
    of a text, pieces of 40 tokens.

    Args:
      temperature: the logits are divided by it for `calibrated_nll` and in the saved file. "fit" takes that of
        `fit_temperature` on the same task over at most 1,000 rows of the training split, spread evenly, with prompts
        as long as those that are scored; no held-out row decides it.
      prompts: a file with other prompts, as `jaxlm.evals.rows.read_rows` reads it; its `tgt` has the true characters.
      save: a new .npz file for `prompts` [R, P] and `targets` [R, 10] (ids), `logits` [R, 10, V] float32, the texts
        `prompt_texts`, `target_texts`, `predicted_texts` [R], and `vocabulary` [V], the symbol of each id.

    Returns:
      nll: nats per character of the true 10, mean over all rows; None where they are not known.
      accuracy: the share of characters that the greedy choice gets right; None as above.
      temperature, calibrated_nll: with a temperature; `nll` after the division. No greedy choice differs.
      fit_rows: rows that the temperature was fitted on.

    Raises:
      UserError: no such row; a temperature that divides nothing (0, below 1e-6, infinite); a learned position table
        that is too short; prompts that cannot be read; a file to save that exists or cannot be written.
    """
    if temperature not in (None, "fit"):
        _check_divisor(temperature)
    if save is not None:
        check_new_npz(save)
    if prompts is None:
        starts, truths = held_out_rows(run, PREDICTION_PROMPT, PREDICTED, limit, whole=True)
    else:
        starts, truths = read_rows(prompts, run, limit)
    truth = None if truths is None else np.stack(truths)
    count, steps = len(starts), PREDICTED if truth is None else truth.shape[1]
    run.model.cfg.check_reach(starts.shape[1] + steps - 1, "use a run with a longer table")
    results: dict[str, Any] = {}
    if temperature == "fit":
        temperature, results["fit_rows"] = _fitted(run, starts.shape[1], steps, batch_size)
    log_probs, greedy = np.zeros((2, count, steps)), np.zeros((count, steps), np.int32)
    kept = None if save is None else np.zeros((count, steps, run.model.cfg.vocab_size), np.float32)
    for rows, logits in _logits(run, starts, steps, batch_size):
        greedy[rows] = np.asarray(logits.argmax(axis=-1))
        scaled = logits if temperature is None else logits / temperature
        if truth is not None:
            log_probs[0, rows], log_probs[1, rows] = (target_log_probs(x, truth[rows]) for x in (logits, scaled))
        if kept is not None:
            kept[rows] = np.asarray(scaled)
    if save is not None and kept is not None:
        arrays, texts = {"prompts": starts, "logits": kept}, {"predicted_texts": _texts(run, greedy)}
        if truth is not None:
            arrays["targets"], texts["target_texts"] = truth, _texts(run, truth)
        _save(save, run, arrays, texts)
    nll, calibrated = (None, None) if truth is None else (-log_probs.mean(axis=(1, 2))).tolist()
    accuracy = None if truth is None else float((greedy == truth).mean())
    if temperature is not None:
        results = {"temperature": temperature, "calibrated_nll": calibrated, **results}
    return {"rows": count, "nll": nll, "accuracy": accuracy, **results}


def _check_divisor(temperature: Any) -> None:
    if not (isinstance(temperature, (int, float)) and MIN_TEMPERATURE <= temperature < math.inf):
        raise UserError(
            f"temperature = {temperature!r} cannot divide logits: give a finite number of at least {MIN_TEMPERATURE}, "
            "or have it fitted"
        )


def _logits(
    run: Run, starts: Int[np.ndarray, "R P"], steps: int, batch_size: int
) -> Iterator[tuple[slice, Float[jax.Array, "B steps V"]]]:
    """The logits of `jaxlm.predict`, batch by batch, and which rows they are of."""
    first = 0
    for batch, real in batches(len(starts), batch_size):
        yield slice(first, first + real), predict(run.model, run.params, starts[batch], steps)[:real]
        first += real


def _fitted(run: Run, width: int, steps: int, batch_size: int) -> tuple[float, int]:
    """The temperature of the prediction task over rows of the training split, and how many those are."""
    prompt = width - (run.tokenizer.eos_token is not None)
    starts, truths = training_rows(run, prompt, steps, FIT_ROWS)
    assert truths is not None
    logits = np.concatenate([np.asarray(part) for _, part in _logits(run, starts, steps, batch_size)])
    return fit_temperature(logits, np.stack(truths)), len(starts)


def generation(
    run: Run,
    sampling: SamplingParams,
    limit: int | None = None,
    batch_size: int = 64,
    *,
    beam_width: int | None = None,
    oracle: Path | None = None,
    prompts: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """How likely the continuations are that `jaxlm.generate` samples after the first 40 characters of each row.

    Rows are the transcripts of at least 40 characters; of a text, pieces of 40 + max_new_tokens tokens. <eos> and <pad>
    are never generated. Row r samples with fold_in(key(seed), r), so the batch size changes nothing. The quantities
    named `true_...` are those of the true continuations, up to max_new_tokens long (rows that end after the prompt have
    none).

    Args:
      beam_width: the best continuation that `jaxlm.beam_search` finds with so many beams, instead of a sample. Of
        `sampling` it reads max_new_tokens and forbidden_tokens.
      oracle: folder of the model that scores the texts: another run, or a Hugging Face model.
      prompts: a file with other prompts, as `jaxlm.evals.rows.read_rows` reads it.
      save: a new .npz file for `prompts` [R, P] and `generated` [R, max_new_tokens] (ids), the texts `prompt_texts`,
        `generated_texts`, `true_texts` [R], and `vocabulary` [V], the symbol of each id.

    Returns:
      log_prob_per_token: mean in nats under the model itself, before temperature and filters. None for the true
        continuations where there are none, or a learned position table is too short for them.
      perplexity: under the oracle: exp(-(log p(prompt + continuation) - log p(prompt)) / tokens that the continuation
        adds), each summed over all rows, in the oracle's own tokens.
      nats_per_character: the same sum over the characters of the continuations.
      examples: prompt, continuation and true continuation of the first rows.

    Raises:
      UserError: no such row, a stop token, a value that `generate` or `beam_search` refuses or that a beam does not
        read, an oracle that `load_scorer` refuses, prompts that cannot be read, a file to save that exists or cannot
        be written.
    """
    if sampling.stop_token is not None:
        raise UserError(f"stop_token = {sampling.stop_token}: the task generates rows of one length; leave it out")
    if save is not None:
        check_new_npz(save)
    if beam_width is not None:
        _check_beam(sampling)
    scorer = None if oracle is None else load_scorer(oracle, batch_size)
    if prompts is None:
        ids, truths = held_out_rows(run, GENERATION_PROMPT, sampling.max_new_tokens, limit, whole=False)
    else:
        ids, truths = read_rows(prompts, run, limit)
    width, truths = ids.shape[1], truths and [truth[: sampling.max_new_tokens] for truth in truths]
    new, log_probs = _generate(run, ids, batch_size, sampling, beam_width)
    starts, generated = _texts(run, ids, from_eos=True), _texts(run, np.hstack([ids, new]), from_eos=True)
    examples = {"prompt": starts, "generation": _added(starts, generated)}
    rows = [np.concatenate(pair) for pair in zip(ids, truths, strict=True)] if truths else []
    true_texts = _texts(run, rows, from_eos=True)
    if truths:
        examples["truth"] = _added(starts, true_texts)
    if save is not None:
        texts = {"generated_texts": examples["generation"], "true_texts": examples.get("truth")}
        _save(save, run, {"prompts": ids, "generated": new}, {name: text for name, text in texts.items() if text})
    longer = [row for row, tokens in enumerate(rows) if len(tokens) > width]
    results: dict[str, Any] = {
        "rows": len(ids),
        "log_prob_per_token": float(log_probs.mean()),
        "true_log_prob_per_token": _log_prob_per_token(run, [rows[row] for row in longer], width, batch_size),
    }
    if scorer is not None:
        results |= score_continuations(scorer, starts, generated)
        if longer:
            truth = score_continuations(scorer, [starts[row] for row in longer], [true_texts[row] for row in longer])
            results |= {"true_rows": len(longer), **{f"true_{name}": value for name, value in truth.items()}}
    results["examples"] = [
        dict(zip(examples, texts, strict=True)) for texts in list(zip(*examples.values(), strict=True))[:EXAMPLES]
    ]
    return results


def _check_beam(sampling: SamplingParams) -> None:
    """Refuses options of sampling that beam search does not read."""
    read = SamplingParams(max_new_tokens=sampling.max_new_tokens, forbidden_tokens=sampling.forbidden_tokens)
    for name, default in vars(read).items():
        given = getattr(sampling, name)
        if given != default:
            raise UserError(f"{name} = {given!r} is not read by beam search: leave it out, or leave beam_width out")


def _generate(
    run: Run, prompts: Int[np.ndarray, "R P"], batch_size: int, sampling: SamplingParams, beam_width: int | None
) -> tuple[Int[np.ndarray, "R new"], Float[np.ndarray, " R"]]:
    """What follows each prompt, without <eos> and <pad>, and its mean log-probability per token."""
    tokenizer, count = run.tokenizer, sampling.max_new_tokens
    special = [token for token in (tokenizer.eos_token, tokenizer.pad_token) if token is not None]
    without_text = range(tokenizer.vocab_size, run.model.cfg.vocab_size)
    forbidden = (*sampling.forbidden_tokens, *special, *without_text)
    options = to_dict(sampling) | {"forbidden_tokens": forbidden}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(options.pop("seed")), jnp.arange(len(prompts)))
    new, log_probs = np.zeros((len(prompts), count), np.int32), np.zeros(len(prompts))
    for batch, real in batches(len(prompts), batch_size):
        if beam_width is None:
            out = generate(run.model, run.params, prompts[batch], key=keys[batch], **options)
            tokens, scores = out.tokens, np.asarray(out.log_probs, np.float64).mean(axis=1)
        else:
            beams = beam_search(
                run.model,
                run.params,
                prompts[batch],
                max_new_tokens=count,
                beam_width=beam_width,
                forbidden_tokens=forbidden,
            )
            tokens, scores = beams.tokens[:, 0], beams.scores[:, 0]  # all have `count` tokens: a mean of each
        new[batch[:real]], log_probs[batch[:real]] = np.asarray(tokens)[:real], np.asarray(scores)[:real]
    return new, log_probs


def _texts(run: Run, rows: Iterable[Int[np.ndarray, " _"]], *, from_eos: bool = False) -> list[str]:
    """The text of each row, without the <eos> that a transcript begins with."""
    begin = int(from_eos and run.tokenizer.eos_token is not None)
    return [run.tokenizer.decode(row[begin:].tolist()) for row in rows]


def _added(starts: list[str], texts: list[str]) -> list[str]:
    """What each text adds to its start."""
    return [text[len(start) :] for start, text in zip(starts, texts, strict=True)]


def _save(path: Path, run: Run, arrays: dict[str, np.ndarray], texts: dict[str, list[str]]) -> None:
    """Writes the arrays and texts of a task, those of its prompts, and the symbol of each id where it has one."""
    texts = {"prompt_texts": _texts(run, arrays["prompts"], from_eos=True), **texts}
    vocabulary = symbols(run.tokenizer)
    if vocabulary is not None:
        texts["vocabulary"] = vocabulary
    whole: Any = arrays | {name: np.array(text) for name, text in texts.items()}
    with staged(path, "choose another --save") as partial, partial.open("wb") as file:
        np.savez(file, **whole)


def _log_prob_per_token(run: Run, rows: list[Int[np.ndarray, " _"]], prompt: int, batch_size: int) -> float | None:
    """Mean log-probability of what follows the prompts; None without rows, or where a position table is too short."""
    longest = max(map(len, rows), default=1) - 1
    if not rows or run.model.cfg.within_reach(longest) < longest:
        return None
    total = row_log_probs(run.model, run.params, rows, batch_size, prompt).sum()
    return float(total / sum(len(row) - prompt for row in rows))


def likelihood(run: Run, limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
    """The log-probability of whole rows: of each transcript in full, from its <eos> to the next.

    Of a text, rows have max_seq_len targets (the last may be shorter), and each begins with the last token of the one
    before.

    Returns:
      log_prob_per_row, log_prob_per_token: means in nats.
      perplexity: exp(-log_prob_per_token).
      targets: tokens predicted.

    Raises:
      UserError: a row that is longer than a learned position table.
    """
    data, eos = held_out(run), run.tokenizer.eos_token
    if isinstance(data, list):
        rows = [np.concatenate([[eos], row, [eos]]) for row in data]
    else:
        seq_len = run.config.model.max_seq_len
        rows = [data[start : start + seq_len + 1] for start in range(0, len(data) - 1, seq_len)]
    rows = rows[:limit]
    log_probs = row_log_probs(run.model, run.params, rows, batch_size)
    targets = sum(len(row) - 1 for row in rows)
    per_token = float(log_probs.sum() / targets)
    return {
        "rows": len(rows),
        "targets": targets,
        "log_prob_per_row": float(log_probs.mean()),
        "log_prob_per_token": per_token,
        "perplexity": _perplexity(-per_token),
    }


def _perplexity(nats: float) -> float:
    """exp(nats per token); infinity where a float cannot hold it, which JSON shows as null."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def score_continuations(scorer: Scorer, starts: list[str], texts: list[str]) -> dict[str, float | None]:
    """Perplexity and nats per character of the part that each text adds to its start."""
    (before, tokens_before), (after, tokens_after) = scorer(starts), scorer(texts)
    nats = -float((after - before).sum())
    added = float((tokens_after - tokens_before).sum())
    characters = sum(map(len, texts)) - sum(map(len, starts))
    return {
        # A continuation may add no token: its characters can merge into the last token of the start.
        "perplexity": _perplexity(nats / added) if added else None,
        "nats_per_character": nats / characters,
    }
