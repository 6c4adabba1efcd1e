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
from jaxlm.model.cache import Cache, grow_cache
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens

PREFILL = 512
"""Prompt tokens run at once; longer prompts go through in pieces, so that no program is wider."""


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
    cache = _empty_cache(model, len(ids), capacity)
    for begin in range(0, int(fed.max()), PREFILL):
        # Widths are powers of two, so that prompts of similar length share a program.
        width = model.cfg.within_reach(min(PREFILL, max(MIN_BUCKET, power_of_two(int(fed.max()) - begin))))
        padded = np.zeros((len(ids), width), np.int32)
        piece = ids[:, begin : begin + width]
        padded[:, : piece.shape[1]] = piece
        # Of a shorter row, less or nothing of this piece is real: the model leaves padding out of the cache.
        cache = _prefill(model, params, cache, padded, np.clip(fed - begin, 0, width))
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


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _prefill(model: LanguageModel, params: Params, cache: Cache, ids: Tokens, lengths: Int[Array, " B"]) -> Cache:
    return cast(Any, model.apply({"params": params}, ids, cache=cache, lengths=lengths))[1]


@functools.partial(jax.jit, static_argnames=("model", "batch_size", "capacity"))
def _empty_cache(model: LanguageModel, batch_size: int, capacity: int) -> Cache:
    return model.init_cache(batch_size, capacity)


@functools.partial(jax.jit, static_argnames="times")
def _repeat_rows(cache: Cache, times: int) -> Cache:
    return jax.tree.map(lambda leaf: repeat(leaf, "B ... -> (B times) ...", times=times), cache)
