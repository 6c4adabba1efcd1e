"""The language-model tasks of CMU's 11-785, on held-out data: prediction, generation, likelihood.

Rows are the held-out transcripts, each beginning with <eos>. A run on text has none: its validation tokens are cut into
rows, without <eos>, and "characters" below are tokens.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Integer

from jaxlm.config import SamplingParams
from jaxlm.config.base import to_dict
from jaxlm.data import transcripts
from jaxlm.data.batches import TokenStream
from jaxlm.data.corpus import load_corpus, read_transcripts
from jaxlm.decode.generate import generate, predict
from jaxlm.errors import UserError
from jaxlm.evals.scorers import Scorer, batches, load_scorer, row_log_probs
from jaxlm.ops.loss import target_log_probs
from jaxlm.run.folder import Run, check_data, check_named

PREDICTION_PROMPT, PREDICTED = 30, 10
GENERATION_PROMPT = 40
EXAMPLES = 5


def prediction(run: Run, limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
    """How well `jaxlm.predict` continues the first 30 characters of each row by the next 10.

    Its logits see its own greedy choices, not the true characters. Rows are the transcripts of at least 40 characters;
    of a text, pieces of 40 tokens.

    Returns:
      nll: nats per character of the true 10, mean over all rows.
      accuracy: the share of characters that the greedy choice gets right.

    Raises:
      UserError: no such row; a learned position table that is too short.
    """
    rows = np.stack(_rows(run, PREDICTION_PROMPT + PREDICTED, PREDICTION_PROMPT + PREDICTED, limit))
    run.model.cfg.check_reach(rows.shape[1] - 1, "use a run with a longer table")
    log_probs, is_right = np.zeros((len(rows), PREDICTED)), np.zeros((len(rows), PREDICTED), bool)
    for batch, real in batches(len(rows), batch_size):
        prompt, truth = rows[batch, :-PREDICTED], rows[batch, -PREDICTED:]
        logits = predict(run.model, run.params, prompt, PREDICTED)
        log_probs[batch[:real]] = np.asarray(target_log_probs(logits, truth))[:real]
        is_right[batch[:real]] = (np.asarray(logits.argmax(axis=-1)) == truth)[:real]
    return {"rows": len(rows), "nll": -float(log_probs.mean()), "accuracy": float(is_right.mean())}


def generation(
    run: Run,
    sampling: SamplingParams,
    limit: int | None = None,
    batch_size: int = 64,
    *,
    oracle: Path | None = None,
) -> dict[str, Any]:
    """How likely the continuations are that `jaxlm.generate` samples after the first 40 characters of each row.

    Rows are the transcripts of at least 40 characters; of a text, pieces of 40 + max_new_tokens tokens. <eos> and <pad>
    are never generated. Row r samples with fold_in(key(seed), r), so the batch size changes nothing. The quantities
    named `true_...` are those of the true continuations, up to max_new_tokens long (rows that end after the prompt have
    none).

    Args:
      oracle: folder of the model that scores the texts: another run, or a Hugging Face model.

    Returns:
      log_prob_per_token: mean in nats under the model itself, before temperature and filters. None for the true
        continuations where a learned position table is too short for them.
      perplexity: under the oracle: exp(-(log p(prompt + continuation) - log p(prompt)) / tokens that the continuation
        adds), each summed over all rows, in the oracle's own tokens.
      nats_per_character: the same sum over the characters of the continuations.
      examples: prompt, continuation and true continuation of the first rows.

    Raises:
      UserError: no such row, a stop token, a value `generate` refuses, or an oracle that `load_scorer` refuses.
    """
    if sampling.stop_token is not None:
        raise UserError(f"stop_token = {sampling.stop_token}: the task generates rows of one length; leave it out")
    scorer = None if oracle is None else load_scorer(oracle, batch_size)
    rows = _rows(run, GENERATION_PROMPT, GENERATION_PROMPT + sampling.max_new_tokens, limit)
    begin = 0 if run.tokenizer.eos_token is None else 1  # <eos> is not part of a text
    width = begin + GENERATION_PROMPT
    prompts = np.stack([row[:width] for row in rows])
    new, log_probs = _generate(run, prompts, batch_size, sampling)

    def texts_of(tokens: Iterable[Int[np.ndarray, " _"]]) -> list[str]:
        return [run.tokenizer.decode(row[begin:].tolist()) for row in tokens]

    starts, generated, truths = texts_of(prompts), texts_of(np.concatenate([prompts, new], axis=1)), texts_of(rows)
    longer = [row for row, tokens in enumerate(rows) if len(tokens) > width]
    results: dict[str, Any] = {
        "rows": len(rows),
        "log_prob_per_token": float(log_probs.mean()),
        "true_log_prob_per_token": _log_prob_per_token(run, [rows[row] for row in longer], width, batch_size),
    }
    if scorer is not None:
        results |= score_continuations(scorer, starts, generated)
        if longer:
            truth = score_continuations(scorer, [starts[row] for row in longer], [truths[row] for row in longer])
            results |= {"true_rows": len(longer), **{f"true_{name}": value for name, value in truth.items()}}
    results["examples"] = [
        {"prompt": start, "generation": text[len(start) :], "truth": truth[len(start) :]}
        for start, text, truth in list(zip(starts, generated, truths, strict=True))[:EXAMPLES]
    ]
    return results


def _generate(
    run: Run, prompts: Int[np.ndarray, "R P"], batch_size: int, sampling: SamplingParams
) -> tuple[Int[np.ndarray, "R new"], Float[np.ndarray, "R new"]]:
    """What follows each prompt, without <eos> and <pad>, and its log-probabilities."""
    tokenizer, shape = run.tokenizer, (len(prompts), sampling.max_new_tokens)
    special = [token for token in (tokenizer.eos_token, tokenizer.pad_token) if token is not None]
    without_text = range(tokenizer.vocab_size, run.model.cfg.vocab_size)
    options = to_dict(sampling) | {"forbidden_tokens": (*sampling.forbidden_tokens, *special, *without_text)}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(options.pop("seed")), jnp.arange(len(prompts)))
    new, log_probs = np.zeros(shape, np.int32), np.zeros(shape)
    for batch, real in batches(len(prompts), batch_size):
        out = generate(run.model, run.params, prompts[batch], key=keys[batch], **options)
        new[batch[:real]], log_probs[batch[:real]] = np.asarray(out.tokens)[:real], np.asarray(out.log_probs)[:real]
    return new, log_probs


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
    held_out, eos = _held_out(run), run.tokenizer.eos_token
    if isinstance(held_out, list):
        rows = [np.concatenate([[eos], row, [eos]]) for row in held_out]
    else:
        seq_len = run.config.model.max_seq_len
        rows = [held_out[start : start + seq_len + 1] for start in range(0, len(held_out) - 1, seq_len)]
    rows = rows[:limit]
    log_probs = row_log_probs(run.model, run.params, rows, batch_size)
    targets = sum(len(row) - 1 for row in rows)
    per_token = float(log_probs.sum() / targets)
    return {
        "rows": len(rows),
        "targets": targets,
        "log_prob_per_row": float(log_probs.mean()),
        "log_prob_per_token": per_token,
        "perplexity": math.exp(-per_token),
    }


def _held_out(run: Run) -> list[transcripts.Utterance] | Integer[np.ndarray, " n"]:
    """The held-out utterances in full, without <eos> and <pad>; of a text, its validation tokens.

    Raises:
      UserError: the data are missing, or are not those of the run.
    """
    check_named(run)
    cfg = run.config.data
    if run.tokenizer.eos_token is not None:
        read = read_transcripts(cfg)
        check_data(read.sha256, run.corpus_sha256)
        return read.val
    corpus = load_corpus(cfg, run.config.model.max_seq_len, run.tokenizer)
    check_data(corpus.sha256, run.corpus_sha256)
    assert isinstance(corpus.val, TokenStream)
    return corpus.val.tokens


def _rows(run: Run, least: int, most: int, limit: int | None) -> list[Int[np.ndarray, " _"]]:
    """<eos> and the first `most` characters of each transcript of at least `least`; of a text, pieces of `most` tokens.

    Raises:
      UserError: there is no such row.
    """
    held_out = _held_out(run)
    if isinstance(held_out, list):
        start = np.array([run.tokenizer.eos_token], np.int32)
        rows = [np.concatenate([start, row[:most]]) for row in held_out if len(row) >= least]
        longest = max(map(len, held_out), default=0)
        reason = f"no held-out transcript has {least} characters (the longest has {longest})"
    else:
        count = min(len(held_out) // most, limit or len(held_out))
        rows = list(held_out[: count * most].reshape(-1, most).astype(np.int32))
        reason = f"the validation split has {len(held_out)} tokens, fewer than the {most} of a row"
    if not rows:
        raise UserError(f"{reason}: the task needs a run with longer held-out data")
    return rows[:limit]


def score_continuations(scorer: Scorer, starts: list[str], texts: list[str]) -> dict[str, float | None]:
    """Perplexity and nats per character of the part that each text adds to its start."""
    (before, tokens_before), (after, tokens_after) = scorer(starts), scorer(texts)
    nats = -float((after - before).sum())
    added = float((tokens_after - tokens_before).sum())
    characters = sum(map(len, texts)) - sum(map(len, starts))
    return {
        # A continuation may add no token: its characters can merge into the last token of the start.
        "perplexity": math.exp(nats / added) if added else None,
        "nats_per_character": nats / characters,
    }
