"""From logits to a token: penalty, filters, draw.

What is compiled in (`Rules`) is apart from the values (`Settings`), so that another temperature or top-k needs no
other program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

TOP_P_CEILING = 1024
"""Top-p looks among this many of the likeliest tokens first: sorting 50,257 takes 20 times as long (docs/log.md)."""


class Rules(NamedTuple):
    """Which filters act; hashable, part of what a program is compiled for."""

    greedy: bool = False
    top_k_ceiling: int | None = None
    """At least the largest top_k, at most V; None = no top-k."""
    top_p: bool = False
    min_p: bool = False
    repetition_penalty: bool = False
    forbidden: bool = False


class Settings(NamedTuple):
    """The values of the filters: arrays, so that a program serves them all."""

    temperature: Float[Array | np.ndarray, ""]
    top_k: Int[Array | np.ndarray, ""]
    top_p: Float[Array | np.ndarray, ""]
    min_p: Float[Array | np.ndarray, ""]
    repetition_penalty: Float[Array | np.ndarray, ""]
    forbidden: Bool[Array | np.ndarray, " V"]
    stop_token: Int[Array | np.ndarray, ""]
    """-1 = none."""


def choose(
    logits: Float[Array, "R V"],
    noise: Float[Array, "R V"] | None,
    seen: Bool[Array, "R V"] | None,
    rules: Rules,
    settings: Settings,
) -> Int[Array, " R"]:
    """The token of each row: the likeliest after penalty and forbidden tokens if greedy, else a draw after all filters.

    Args:
      noise: standard Gumbel noise, with which the argmax is a draw from the softmax (`jax.random.categorical`).
      seen: the tokens in each row's past, where a repetition penalty acts.
    """
    logits = penalise(logits, seen, rules, settings)
    if noise is not None:
        logits = filter_logits(logits / settings.temperature.astype(logits.dtype), rules, settings) + noise
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def penalise(
    logits: Float[Array, "R V"], seen: Bool[Array, "R V"] | None, rules: Rules, settings: Settings
) -> Float[Array, "R V"]:
    """Logits, those of tokens seen before divided by the penalty (times it, below 0), forbidden ones at -inf.

    Source of the penalty: Keskar et al. 2019, CTRL, https://arxiv.org/abs/1909.05858, section 4.1; negative logits as
    in transformers.
    """
    if seen is not None and rules.repetition_penalty:
        penalty = settings.repetition_penalty.astype(logits.dtype)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if rules.forbidden:
        logits = jnp.where(settings.forbidden[None], -jnp.inf, logits)
    return logits


def filter_logits(logits: Float[Array, "R V"], rules: Rules, settings: Settings) -> Float[Array, "R V"]:
    """-inf for what top-k, then top-p, then min-p leave out; ties with the last one kept stay in.

    top-k keeps the k largest; top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751) the fewest largest whose
    probabilities among those left reach p; min-p (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082) those at least
    min_p times as probable as the likeliest.
    """
    vocab_size = logits.shape[-1]
    head = logits
    if rules.top_k_ceiling is not None or rules.top_p:
        head = jax.lax.top_k(logits, min(rules.top_k_ceiling or TOP_P_CEILING, vocab_size))[0]
    if rules.top_k_ceiling is not None:
        last = jnp.take_along_axis(head, jnp.broadcast_to(settings.top_k - 1, (len(head), 1)), axis=-1)
        logits, head = (jnp.where(x >= last, x, -jnp.inf) for x in (logits, head))
    if rules.top_p:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        top_p = settings.top_p.astype(logits.dtype)

        def last_kept(ordered: Float[Array, "R ordered"]) -> Float[Array, "R 1"]:
            probs = jnp.exp(ordered - total)
            before = jnp.cumsum(probs, axis=-1) - probs  # what stands before has not reached top_p
            kept = ((before < top_p) & (ordered > -jnp.inf)).at[:, 0].set(True)  # also where top_p is 0 in float32
            return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)

        if rules.top_k_ceiling is not None or head.shape[-1] == vocab_size:
            last = last_kept(head)
        else:  # the likeliest nearly always reach top_p; where a row's do not, sort them all
            enough = jnp.all(jnp.exp(head - total).sum(axis=-1) >= top_p)
            last = jax.lax.cond(
                enough, lambda: last_kept(head), lambda: last_kept(jnp.sort(logits, axis=-1, descending=True))
            )
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    if rules.min_p:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(settings.min_p.astype(logits.dtype))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def gumbel_noise(
    row_keys: Key[Array, " R"], step: Int[Array, ""], count: int, vocab_size: int, dtype: DTypeLike
) -> Float[Array, "count R V"]:
    """The noise of `count` steps from `step` on: row r takes that of fold_in(row_keys[r], step) for its draw."""

    def one(row_key: Key[Array, ""], step: Int[Array, ""]) -> Float[Array, " V"]:
        return jax.random.gumbel(jax.random.fold_in(row_key, step), (vocab_size,), dtype)

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(row_keys, step + jnp.arange(count))
