"""From logits to a token: penalty, filters, random choice.

Which filters act (`FilterFlags`) is compiled in; their values (`FilterValues`) are arrays, so that another temperature
or top-k needs no other program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.config import SamplingParams
from jaxlm.decode.capacity import power_of_two

TOP_P_CEILING = 1024
"""Top-p looks among this many of the likeliest tokens first: sorting 50,257 takes 20 times as long (docs/log.md)."""


class FilterFlags(NamedTuple):
    """Which filters act; hashable, part of what a program is compiled for."""

    greedy: bool = False
    top_k_ceiling: int | None = None
    """At least the largest top_k, at most V; None = no top-k."""
    top_p: bool = False
    min_p: bool = False
    repetition_penalty: bool = False
    forbidden: bool = False

    @classmethod
    def of(cls, sampling: SamplingParams, vocab_size: int) -> "FilterFlags":
        """The filters that change anything. A top-k's ceiling is a power of two: near values share a program."""
        is_greedy, top_p = sampling.temperature == 0, sampling.top_p
        top_k = None if is_greedy or sampling.top_k is None or sampling.top_k >= vocab_size else sampling.top_k
        return cls(
            greedy=is_greedy,
            top_k_ceiling=None if top_k is None else min(power_of_two(top_k), vocab_size),
            top_p=not is_greedy and top_p is not None and top_p < 1,
            min_p=not is_greedy and sampling.min_p is not None,
            repetition_penalty=sampling.repetition_penalty != 1,
            forbidden=len(sampling.forbidden_tokens) > 0,
        )


class FilterValues(NamedTuple):
    """The values of the filters, as arrays: one program serves them all. Values of filters that are off are unused."""

    temperature: Float[Array | np.ndarray, ""]
    top_k: Int[Array | np.ndarray, ""]
    top_p: Float[Array | np.ndarray, ""]
    min_p: Float[Array | np.ndarray, ""]
    repetition_penalty: Float[Array | np.ndarray, ""]
    forbidden: Bool[Array | np.ndarray, " V"]
    stops: Bool[Array | np.ndarray, " V"]
    """Tokens that end a row."""

    @classmethod
    def of(cls, sampling: SamplingParams, vocab_size: int) -> "FilterValues":
        """The values that a request asks for, floats in float64: the program rounds them to the type of the logits."""
        forbidden, stops = np.zeros(vocab_size, bool), np.zeros(vocab_size, bool)
        forbidden[list(sampling.forbidden_tokens)] = True
        stops[list(sampling.stop_tokens)] = True
        return cls(
            temperature=np.asarray(sampling.temperature or 1.0, np.float64),
            top_k=np.asarray(sampling.top_k or 1, np.int32),
            top_p=np.asarray(1.0 if sampling.top_p is None else sampling.top_p, np.float64),
            min_p=np.asarray(sampling.min_p or 0.0, np.float64),
            repetition_penalty=np.asarray(sampling.repetition_penalty, np.float64),
            forbidden=forbidden,
            stops=stops,
        )


def sample_token(
    logits: Float[Array, "R V"],
    noise: Float[Array, "R V"] | None,
    seen: Bool[Array, "R V"] | None,
    flags: FilterFlags,
    values: FilterValues,
) -> Int[Array, " R"]:
    """The next token of each row.

    Args:
      noise: standard Gumbel noise. The argmax of logits + noise is a draw from their softmax, the same that
        `jax.random.categorical` makes of the noise's key. None = greedy: the likeliest token that is not forbidden.
      seen: the tokens in each row's past, where a repetition penalty acts.
    """
    logits = penalise(logits, seen, flags, values)
    if noise is not None:
        logits = filter_logits(logits / values.temperature.astype(logits.dtype), flags, values) + noise
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def penalise(
    logits: Float[Array, "R V"], seen: Bool[Array, "R V"] | None, flags: FilterFlags, values: FilterValues
) -> Float[Array, "R V"]:
    """The logits with the penalty on tokens seen before (positive logits divided by it, negative ones multiplied), and
    -inf for forbidden tokens.

    Source of the penalty: Keskar et al. 2019, CTRL, https://arxiv.org/abs/1909.05858, section 4.1; negative logits as
    in transformers.
    """
    if seen is not None and flags.repetition_penalty:
        penalty = values.repetition_penalty.astype(logits.dtype)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if flags.forbidden:
        logits = jnp.where(values.forbidden[None], -jnp.inf, logits)
    return logits


def filter_logits(logits: Float[Array, "R V"], flags: FilterFlags, values: FilterValues) -> Float[Array, "R V"]:
    """The logits with -inf for tokens that top-k, then top-p, then min-p leave out; ties with the last kept stay in.

    top-k keeps the k largest; top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751) the fewest largest whose
    probabilities among those left reach p; min-p (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082) those at least
    min_p times as probable as the likeliest.
    """
    vocab_size = logits.shape[-1]
    head = logits  # the largest logits of each row in order: all that top-k needs, and nearly always enough for top-p
    if flags.top_k_ceiling is not None or flags.top_p:
        head = jax.lax.top_k(logits, min(flags.top_k_ceiling or TOP_P_CEILING, vocab_size))[0]
    if flags.top_k_ceiling is not None:
        last = jnp.take_along_axis(head, jnp.broadcast_to(values.top_k - 1, (len(head), 1)), axis=-1)
        logits, head = (jnp.where(x >= last, x, -jnp.inf) for x in (logits, head))
    if flags.top_p:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        top_p = values.top_p.astype(logits.dtype)

        def last_kept(ordered: Float[Array, "R ordered"]) -> Float[Array, "R 1"]:
            probs = jnp.exp(ordered - total)
            before = jnp.cumsum(probs, axis=-1) - probs  # a token stays where those before it do not reach top_p
            kept = ((before < top_p) & (ordered > -jnp.inf)).at[:, 0].set(True)  # also where top_p is 0 in float32
            return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)

        if flags.top_k_ceiling is not None or head.shape[-1] == vocab_size:
            last = last_kept(head)
        else:  # the first TOP_P_CEILING nearly always reach top_p; where those of some row do not, all are sorted
            enough = jnp.all(jnp.exp(head - total).sum(axis=-1) >= top_p)
            last = jax.lax.cond(
                enough, lambda: last_kept(head), lambda: last_kept(jnp.sort(logits, axis=-1, descending=True))
            )
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    if flags.min_p:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(values.min_p.astype(logits.dtype))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def gumbel_noise(
    row_keys: Key[Array, " R"], step: Int[Array, ""], count: int, vocab_size: int, dtype: DTypeLike
) -> Float[Array, "count R V"]:
    """The noise of `count` steps from `step` on: at step i, row r has that of fold_in(row_keys[r], i)."""

    def one(row_key: Key[Array, ""], step: Int[Array, ""]) -> Float[Array, " V"]:
        return jax.random.gumbel(jax.random.fold_in(row_key, step), (vocab_size,), dtype)

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(row_keys, step + jnp.arange(count))
