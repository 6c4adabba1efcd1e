"""From prompts to a filled cache, and one step from there."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decode.request import Request, power_of_two
from jaxlm.model.cache import Cache, grow_cache, init_cache
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens, tree_bytes

PREFILL = 512
"""Prompt tokens run at once; longer prompts go through in pieces."""


MIN_BUCKET = 16


class State(NamedTuple):
    """What a step takes and leaves.

    cache: what came before `token`.
    token: [R] the token each row feeds next.
    seen: [R, V] the tokens in each row's past; None without a repetition penalty.
    done: [R] rows that drew the stop token.
    step: [] which new token comes next, 0 = the first.
    """

    cache: Cache
    token: Int[Array, " R"]
    seen: Bool[Array, "R V"] | None
    done: Bool[Array, " R"]
    step: Int[Array, ""]


def start(model: LanguageModel, params: Params, request: Request, capacity: int) -> State:
    """Runs all but the last token of each prompt into a new cache; every sample of a prompt gets a copy of it."""
    ids, fed = request.ids, request.lengths - 1
    cache = _empty(model, len(ids), capacity)
    for begin in range(0, int(fed.max()), PREFILL):
        width = min(PREFILL, max(MIN_BUCKET, power_of_two(int(fed.max()) - begin)))
        if model.cfg.has_position_table:
            width = min(width, model.cfg.max_seq_len)
        piece = np.zeros((len(ids), width), np.int32)
        some = ids[:, begin : begin + width]
        piece[:, : some.shape[1]] = some
        cache = _prefill(model, params, cache, piece, np.clip(fed - begin, 0, width))
    if request.num_samples > 1:
        cache = _repeat(cache, request.num_samples)
    seen = None
    if request.rules.repetition_penalty:
        of_prompt = np.zeros((len(ids), model.cfg.vocab_size), bool)
        for row, length in enumerate(request.lengths):
            of_prompt[row, ids[row, :length]] = True
        seen = jnp.asarray(np.repeat(of_prompt, request.num_samples, axis=0))
    last = np.repeat(ids[np.arange(len(ids)), fed], request.num_samples)
    return State(cache, jnp.asarray(last), seen, jnp.zeros(request.rows, bool), jnp.int32(0))


def apply_cached(
    model: LanguageModel, params: Params, token: Int[Array, " R"], cache: Cache
) -> tuple[Float[Array, "R V"], Cache]:
    """One step of the model: the logits after `token`, and the cache with it."""
    logits, cache = cast(Any, model.apply({"params": params}, token[:, None], cache=cache))
    return logits[:, 0], cache


def capacities(model: LanguageModel, params: Params, request: Request) -> list[int]:
    """The capacities to go through: powers of two, each twice the one before, and the last that is needed.

    A cache smaller than the weights is not worth a program of its own, so the first is at least so large.
    """
    cfg, needed = model.cfg, request.longest + request.cached_steps - 1
    if cfg.family != "transformer":
        return [1]
    last = request.context
    if not request.overflows:
        last = power_of_two(max(needed, MIN_BUCKET))
        if cfg.has_position_table:
            last = min(last, cfg.max_seq_len)

    def cache_size(capacity: int) -> int:
        return tree_bytes(jax.eval_shape(functools.partial(init_cache, cfg, request.rows, capacity)))

    first, weights = power_of_two(max(request.longest, MIN_BUCKET)), tree_bytes(params)
    while first < last and cache_size(min(2 * first, last)) <= weights:
        first *= 2
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _prefill(model: LanguageModel, params: Params, cache: Cache, ids: Tokens, lengths: Int[Array, " B"]) -> Cache:
    return cast(Any, model.apply({"params": params}, ids, cache=cache, lengths=lengths))[1]


@functools.partial(jax.jit, static_argnames=("model", "batch_size", "capacity"))
def _empty(model: LanguageModel, batch_size: int, capacity: int) -> Cache:
    return model.init_cache(batch_size, capacity)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def _grow(model: LanguageModel, cache: Cache, capacity: int) -> Cache:
    return grow_cache(model.cfg, cache, capacity)


@functools.partial(jax.jit, static_argnames="times")
def _repeat(cache: Cache, times: int) -> Cache:
    return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), cache)
