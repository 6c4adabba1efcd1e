"""From prompts to a filled cache, and one step from there."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decode.capacity import MIN_BUCKET, power_of_two
from jaxlm.decode.request import Prompts
from jaxlm.model.cache import Cache, constrain_cache, grow_cache
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens

PREFILL = 512
"""Prompt tokens run at once behind others; what is longer goes through in pieces, so that no program is wider."""

FIRST, FIRST_TOKENS = 2048, 1 << 17
"""Tokens of the first piece of a prompt at most, and about those of all rows together: no cache is read for them."""


class State(NamedTuple):
    """What a step of cached decoding takes and returns.

    cache: all that came before `token`.
    token: [R] the token that each row feeds next.
    seen: [R, V] the tokens in each row's past; None without a repetition penalty.
    done: [R] rows that have their stop token.
    step: [] index of the next new token, 0 = the first.
    """

    cache: Cache
    token: Int[Array, " R"]
    seen: Bool[Array, "R V"] | None
    done: Bool[Array, " R"]
    step: Int[Array, ""]


def start(model: LanguageModel, params: Params, prompts: Prompts, capacity: int, with_seen: bool = False) -> State:
    """The state before the first new token: every prompt is run once, and each of its samples gets a copy of its cache.

    All but the last token of each prompt go into the cache. The last one is the first that a step feeds, so the first
    new token is computed by the same program as the others.

    Args:
      with_seen: also note the prompt's tokens, for a repetition penalty.
    """
    ids, fed = prompts.ids, prompts.lengths - 1
    cache, begin, end = None, 0, int(fed.max())
    while begin < end:
        width = model.cfg.within_reach(_piece(end - begin, len(ids), first=cache is None))
        padded = np.zeros((len(ids), width), np.int32)
        piece = ids[:, begin : begin + width]
        padded[:, : piece.shape[1]] = piece
        # Of a shorter row, less or nothing of this piece is real: the model leaves padding out of the cache.
        lengths = np.clip(fed - begin, 0, width)
        if cache is None:
            cache = _begin(model, params, padded, lengths, capacity)
        else:
            cache = _go_on(model, params, cache, padded, lengths)
        begin += width
    if cache is None:
        cache = _empty_cache(model, len(ids), capacity)
    if prompts.num_samples > 1:
        cache = _repeat_rows(cache, prompts.num_samples)
    seen = None
    if with_seen:
        in_prompt = np.zeros((len(ids), model.cfg.vocab_size), bool)
        for row, length in enumerate(prompts.lengths):
            in_prompt[row, ids[row, :length]] = True
        seen = jnp.asarray(repeat(in_prompt, "B V -> (B samples) V", samples=prompts.num_samples))
    last = repeat(ids[np.arange(len(ids)), fed], "B -> (B samples)", samples=prompts.num_samples)
    return State(cache, jnp.asarray(last), seen, jnp.zeros(prompts.rows, bool), jnp.int32(0))


def apply_cached(
    model: LanguageModel, params: Params, token: Int[Array, " R"], cache: Cache
) -> tuple[Float[Array, "R V"], Cache]:
    """One step of the model: the logits after `token`, and the cache with it."""
    logits, cache = cast(Any, model.apply({"params": params}, token[:, None], cache=cache))
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def grow(model: LanguageModel, cache: Cache, capacity: int) -> Cache:
    """A copy of the cache with more slots, compiled."""
    return grow_cache(model.cfg, cache, capacity)


def _piece(left: int, rows: int, first: bool) -> int:
    """The width of the next piece of a prompt: a power of two, so that prompts of similar length share a program."""
    most = min(FIRST, max(PREFILL, power_of_two(FIRST_TOKENS // rows))) if first else PREFILL
    width = max(MIN_BUCKET, power_of_two(left))
    if width > PREFILL and left <= 0.75 * width:  # too much would be padding
        width //= 2
    return min(most, width)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def _begin(model: LanguageModel, params: Params, ids: Tokens, lengths: Int[Array, " B"], capacity: int) -> Cache:
    return cast(Any, model.apply({"params": params}, ids, cache=capacity, lengths=lengths))[1]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _go_on(model: LanguageModel, params: Params, cache: Cache, ids: Tokens, lengths: Int[Array, " B"]) -> Cache:
    return cast(Any, model.apply({"params": params}, ids, cache=cache, lengths=lengths))[1]


@functools.partial(jax.jit, static_argnames=("model", "batch_size", "capacity"))
def _empty_cache(model: LanguageModel, batch_size: int, capacity: int) -> Cache:
    return model.init_cache(batch_size, capacity)


@functools.partial(jax.jit, static_argnames="times")
def _repeat_rows(cache: Cache, times: int) -> Cache:
    return constrain_cache(jax.tree.map(lambda leaf: repeat(leaf, "B ... -> (B times) ...", times=times), cache))
