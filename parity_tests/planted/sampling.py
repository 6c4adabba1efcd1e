"""Sampling: filters and their order, the random numbers, stop tokens, what is reported of a draw."""

from typing import Any

from jaxlm.decode import filters, generate, generation, prefill
from planted.bugs import FLOAT64, ROPE, Bug, Edit, edit


def drawn(name: str, what: str, layer: str, cause: str, *edits: Edit) -> Bug:
    """A bug of sampling; the layer is the stage that goes wrong."""
    fields: dict[str, Any] = {
        **ROPE,
        **FLOAT64,
        "num_layers": 1,
        "max_seq_len": 24,
        "tie_embeddings": False,
        "head_bias": True,
    }
    return Bug(name, what, layer, cause, edits, fields, check="sampling", quantity="sampling")


ONE_STEP = generate._advance
BUGS = [
    drawn(
        "greedy choice of the last of equals",
        "Of several largest logits the last is chosen.",
        "greedy", "the last is chosen!",
        edit(filters.sample_token, "jnp.argmax(logits, axis=-1)",
             "(logits.shape[-1] - 1 - jnp.argmax(logits[:, ::-1], axis=-1))"),
    ),
    drawn(
        "repetition penalty that rewards",
        "Negative logits are divided by the penalty too: such tokens become likelier.",
        "penalty", "negative logits divided too!",
        edit(filters.penalise, "logits * penalty", "logits / penalty"),
    ),
    drawn(
        "top-k one too many",
        "top_k keeps k + 1 tokens.",
        "top-k", "one token too many!",
        edit(filters.filter_logits, "values.top_k - 1", "values.top_k"),
    ),
    drawn(
        "top-p without the token that crosses it",
        "top_p leaves out the token with which the sum reaches p.",
        "top-p", "crosses top_p left out!",
        edit(filters.filter_logits, "(before < top_p)", "(before + probs < top_p)"),
    ),
    drawn(
        "min-p as a probability",
        "min_p is compared with the probability itself, not with its share of the largest.",
        "min-p", "taken as a probability!",
        edit(filters.filter_logits, "logits.max(axis=-1, keepdims=True) + jnp.log",
             "jax.nn.logsumexp(logits, axis=-1, keepdims=True) + jnp.log"),
    ),
    drawn(
        "temperature after the filters",
        "The filters read the logits before they are divided by the temperature.",
        "order", "temperature after the filters!",
        edit(filters.sample_token, "filter_logits(logits / values.temperature.astype(logits.dtype), flags, values)",
             "filter_logits(logits, flags, values) / values.temperature.astype(logits.dtype)"),
    ),
    drawn(
        "top-p of all tokens behind top-k",
        "top_p counts the probabilities among all tokens, not among those that top_k leaves.",
        "order", "of all!",
        edit(filters.filter_logits, "head = logits  #", "head = whole = logits  #",
             "jax.nn.logsumexp(logits, axis=-1", "jax.nn.logsumexp(whole, axis=-1"),
    ),
    drawn(
        "one noise for all rows",
        "All rows draw with the same key, so equal prompts get equal continuations.",
        "tokens", "one noise for all rows!",
        edit(generate._row_keys, "jnp.arange(rows)", "0 * jnp.arange(rows)"),
    ),
    drawn(
        "one noise for all steps",
        "Every step draws the random numbers of the first.",
        "tokens", "one noise for all steps!",
        edit(filters.gumbel_noise, "step + jnp.arange(count)", "0 * step + jnp.zeros(count, int)"),
    ),
    drawn(
        "penalty without the prompt",
        "Tokens of the prompt do not count as seen.",
        "tokens", "the prompt is not penalised!",
        edit(prefill.start, "ids[row, :length]] = True", "ids[row, :length]] = False"),
    ),
    drawn(
        "penalty on padding",
        "The padding of a shorter prompt counts as seen.",
        "tokens", "the padding of prompts is penalised!",
        edit(prefill.start, "in_prompt[row, ids[row, :length]]", "in_prompt[row, ids[row]]"),
    ),
    drawn(
        "penalty without new tokens",
        "Tokens that were drawn do not count as seen.",
        "tokens", "new tokens are not penalised!",
        edit(ONE_STEP, "state.seen.at[jnp.arange(rows), token].set(True)", "state.seen"),
    ),
    drawn(
        "rows that go on after their stop token",
        "A row that has stopped goes on being sampled.",
        "tokens", "rows go on after their stop token!",
        edit(ONE_STEP, "jnp.where(state.done, state.token, token)", "token"),
    ),
    drawn(
        "a stop that ends all rows",
        "Sampling ends as soon as one row has its stop token.",
        "tokens", "rows that are done",
        edit(ONE_STEP, "~state.done.all()", "~state.done.any()"),
    ),
    drawn(
        "stop token counted",
        "The length of a row counts its stop token.",
        "lengths", "the stop token is counted!",
        edit(generation.join_blocks, ".sum(axis=1, dtype=np.int32)",
             ".sum(axis=1, dtype=np.int32) + np.asarray(stops)[tokens].any(axis=1).astype(np.int32)"),
    ),
    drawn(
        "log-probabilities after the temperature",
        "The log-probability of a token is that of the distribution it was drawn from, not of the model's own.",
        "log-probabilities", "after the temperature!",
        edit(ONE_STEP, "target_log_probs(logits, token,",
             "target_log_probs(logits / values.temperature.astype(logits.dtype), token,"),
    ),
]  # fmt: skip
