"""What CMU's 11-785 asks of a language model, over the held-out split: prediction, generation, likelihood.

Rows are the held-out transcripts, each from <eos> on. Where there are none, a text's validation tokens are cut into
rows, without <eos>; "characters" below then are tokens.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Integer

from jaxlm.data import transcripts
from jaxlm.data.batches import TokenStream
from jaxlm.data.corpus import load_corpus, read_transcripts
from jaxlm.decode.generate import generate, predict
from jaxlm.errors import UserError
from jaxlm.evals.scorers import Oracle, batches, load_oracle, row_log_probs
from jaxlm.run.folder import Run, check_data, check_named

PREDICTION_PROMPT, PREDICTED = 30, 10
GENERATION_PROMPT, GENERATED = 40, 30
EXAMPLES = 5


def prediction(run: Run, limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
    """The 10 characters after the first 30 under `jaxlm.predict`, whose logits see its own greedy choices.

    Rows are the transcripts of at least 40 characters; of a text, pieces of 40 tokens.

    Returns:
      nll: nats per character of the true 10, mean over all rows.
      accuracy: the share of characters that the greedy choice gets right.

    Raises:
      UserError: no such row; a learned position table that is too short.
    """
    rows = np.stack(_rows(run, PREDICTION_PROMPT + PREDICTED, PREDICTION_PROMPT + PREDICTED, limit))
    needed, cfg = rows.shape[1] - 1, run.model.cfg
    if cfg.has_position_table and needed > cfg.max_seq_len:
        raise UserError(
            f"the task reads {needed} tokens, past the learned position table of max_seq_len = {cfg.max_seq_len}: "
            "use a run with a longer table, or with other positions"
        )
    log_probs, right = np.zeros((len(rows), PREDICTED)), np.zeros((len(rows), PREDICTED), bool)
    for batch, real in batches(len(rows), batch_size):
        prompt, truth = rows[batch, :-PREDICTED], rows[batch, -PREDICTED:]
        logits = predict(run.model, run.params, prompt, PREDICTED)
        chosen = jnp.take_along_axis(logits, truth[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        log_probs[batch[:real]] = np.asarray(chosen)[:real]
        right[batch[:real]] = (np.asarray(logits.argmax(axis=-1)) == truth)[:real]
    return {"rows": len(rows), "nll": -float(log_probs.mean()), "accuracy": float(right.mean())}


def generation(
    run: Run,
    limit: int | None = None,
    batch_size: int = 64,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    oracle: Path | None = None,
) -> dict[str, Any]:
    """30 characters drawn after the first 40, without <eos> and <pad>, and how likely they are.

    Rows are the transcripts of at least 40 characters; of a text, pieces of 70 tokens. Row r draws with
    fold_in(key(seed), r), so the batch size changes nothing. What is said of the drawn characters is said, under
    `true_...`, of those that do follow, up to 30 (rows that end after the prompt have none).

    Returns:
      log_prob_per_token: nats, under the model itself, before temperature and filters. None for the true ones where a
        learned position table is too short for them.
      perplexity: under the oracle: exp(-(log p(prompt + drawn) - log p(prompt)) / tokens that the drawn part adds),
        sums over all rows, in the oracle's own tokens.
      nats_per_character: that sum over the characters drawn.
      examples: the first rows' prompt, what was drawn, and what follows.

    Raises:
      UserError: no such row, a value `generate` refuses, or an oracle that `load_oracle` refuses.
    """
    judge = None if oracle is None else load_oracle(oracle, batch_size)
    rows = _rows(run, GENERATION_PROMPT, GENERATION_PROMPT + GENERATED, limit)
    begin = 0 if run.tokenizer.eos_token is None else 1  # <eos> is no part of a text
    width = begin + GENERATION_PROMPT
    prompts = np.stack([row[:width] for row in rows])
    drawn, log_probs = _draw(run, prompts, batch_size, seed, temperature=temperature, top_k=top_k, top_p=top_p)

    def texts(of: Iterable[Int[np.ndarray, " _"]]) -> list[str]:
        return [run.tokenizer.decode(row[begin:].tolist()) for row in of]

    starts, wholes, truths = texts(prompts), texts(np.concatenate([prompts, drawn], axis=1)), texts(rows)
    longer = [row for row, tokens in enumerate(rows) if len(tokens) > width]
    found: dict[str, Any] = {
        "rows": len(rows),
        "log_prob_per_token": float(log_probs.mean()),
        "true_log_prob_per_token": _per_token(run, [rows[row] for row in longer], width, batch_size),
    }
    if judge is not None:
        found |= _added(judge, starts, wholes)
        if longer:
            of_truth = _added(judge, [starts[row] for row in longer], [truths[row] for row in longer])
            found |= {"true_rows": len(longer), **{f"true_{name}": value for name, value in of_truth.items()}}
    found["examples"] = [
        {"prompt": start, "generation": whole[len(start) :], "truth": truth[len(start) :]}
        for start, whole, truth in list(zip(starts, wholes, truths, strict=True))[:EXAMPLES]
    ]
    return found


def _draw(
    run: Run, prompts: Int[np.ndarray, "R P"], batch_size: int, seed: int, **filters: Any
) -> tuple[Int[np.ndarray, "R new"], Float[np.ndarray, "R new"]]:
    """What follows each prompt, without <eos> and <pad>, and the log-probabilities."""
    made, count = run.tokenizer, len(prompts)
    forbidden = [token for token in (made.eos_token, made.pad_token) if token is not None]
    forbidden += range(made.vocab_size, run.model.cfg.vocab_size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
    drawn, log_probs = np.zeros((count, GENERATED), np.int32), np.zeros((count, GENERATED))
    for batch, real in batches(count, batch_size):
        out = generate(
            run.model,
            run.params,
            prompts[batch],
            max_new_tokens=GENERATED,
            key=keys[batch],
            forbidden_tokens=forbidden,
            **filters,
        )
        drawn[batch[:real]], log_probs[batch[:real]] = np.asarray(out.tokens)[:real], np.asarray(out.log_probs)[:real]
    return drawn, log_probs


def _per_token(run: Run, rows: list[Int[np.ndarray, " _"]], prompt: int, batch_size: int) -> float | None:
    """Mean log-probability of what follows the prompts; None where there is nothing, or no room in a position table."""
    cfg = run.model.cfg
    if not rows or (cfg.has_position_table and max(map(len, rows)) - 1 > cfg.max_seq_len):
        return None
    total = row_log_probs(run.model, run.params, rows, batch_size, prompt).sum()
    return float(total / sum(len(row) - prompt for row in rows))


def likelihood(run: Run, limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
    """The log-probability of whole rows: of each transcript, uncut, from its <eos> to the next.

    Of a text: rows of max_seq_len targets, the shorter remainder included, each row beginning with the last token of
    the one before.

    Returns:
      log_prob_per_row, log_prob_per_token: means in nats.
      perplexity: exp(-log_prob_per_token).
      targets: tokens predicted.

    Raises:
      UserError: a row that a learned position table has no place for.
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
    """The held-out utterances, uncut and without frame; of a text its validation tokens.

    Raises:
      UserError: data that are not there, or not those of the run.
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
      UserError: there is none.
    """
    held_out = _held_out(run)
    if isinstance(held_out, list):
        start = np.array([run.tokenizer.eos_token], np.int32)
        rows = [np.concatenate([start, row[:most]]) for row in held_out if len(row) >= least]
        longest = max(map(len, held_out), default=0)
        what = f"no held-out transcript has {least} characters (the longest has {longest})"
    else:
        count = min(len(held_out) // most, limit or len(held_out))
        rows = list(held_out[: count * most].reshape(-1, most).astype(np.int32))
        what = f"the validation split has {len(held_out)} tokens, fewer than the {most} of a row"
    if not rows:
        raise UserError(f"{what}: the task needs a run with longer held-out data")
    return rows[:limit]


def _added(judge: Oracle, starts: list[str], wholes: list[str]) -> dict[str, float | None]:
    """What an oracle says of the part that each text adds to its start."""
    (before, tokens_before), (after, tokens) = judge(starts), judge(wholes)
    nats = -float((after - before).sum())
    added = float((tokens - tokens_before).sum())
    characters = sum(map(len, wholes)) - sum(map(len, starts))
    return {
        "perplexity": math.exp(nats / added) if added else None,  # an end may melt into the last token of its start
        "nats_per_character": nats / characters,
    }
