"""Cached decoding: prefill, then scans over blocks of new tokens until every row is done.

A program is compiled for a batch size, a bucket of prompt lengths, a bucket of capacities and a set of filters
(`sampling.Rules`); temperatures and the like, and how many tokens from 5 on, are values.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.decode.filters import Rules, Settings, choose, gumbel_noise
from jaxlm.decode.prefill import State, _grow, apply_cached, capacities, start
from jaxlm.decode.request import Block, Generation, Request, assemble, power_of_two
from jaxlm.decode.uncached import recompute
from jaxlm.model.layer_stack import unrolled
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens

MAX_STEPS = 256
"""New tokens a call of the compiled loop returns at most: between calls the host sees which rows are done."""
MAX_BLOCK, MAX_NOISE = 8, 1 << 17
"""A scan draws the noise of a block of steps at once: at most so many steps, and so many numbers. On a CPU one step's
random bits cost as much as a layer (docs/log.md)."""


def generate(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    *,
    max_new_tokens: int,
    key: Key[Array, "*rows"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    stop_token: int | None = None,
    forbidden_tokens: Sequence[int] = (),
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    capacity: int | None = None,
    on_overflow: Literal["continue", "error"] = "continue",
) -> Generation:
    """Continues each prompt with `max_new_tokens` tokens drawn from softmax(logits / temperature), filtered.

    Row r draws token i with fold_in(fold_in(key, r), i), by `jax.random.categorical`: the same key gives the same
    tokens, and `generate_naive`, `stream`, other batches and a row alone (with its own key) draw them too.

    Filters act in this order: repetition penalty, forbidden tokens, temperature, top-k, top-p, min-p. All work stops
    when every row has drawn the stop token.

    Args:
      prompt: [B, P] token ids, P >= 1.
      key: a `jax.random.key`, or [R] of them, one for each row.
      temperature: 0 is exactly greedy.
      top_k: draw among the k likeliest tokens (and those as likely as the last of them).
      top_p: draw among the fewest likeliest tokens whose probabilities (after temperature and top_k) reach top_p.
      min_p: draw among the tokens at least min_p times as probable as the likeliest.
      repetition_penalty: above 1, tokens of the prompt and those drawn become less likely; acts on greedy choice too.
      num_samples: rows drawn for each prompt; the prompt is run once.
      stop_token: a row that draws it is finished.
      forbidden_tokens: ids that are never drawn.
      prompt_lengths: [B] real tokens of each right-padded prompt; None = all P.
      capacity: tokens the cache holds; None = min(prompt + new, max_seq_len). Past it, with on_overflow="continue", a
        model without position table rolls: it is the one whose every window is min(W, capacity). A learned table
        cannot roll; there each token costs a forward pass over the latest `capacity` tokens. Recurrent models and
        bigrams never overflow.
      on_overflow: "error" refuses before anything is computed.

    Raises:
      UserError: an argument out of range, prompt ids outside the vocabulary, or an overflow that is refused.
    """
    request = Request(
        model.cfg,
        prompt,
        max_new_tokens=max_new_tokens,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_samples=num_samples,
        stop_token=stop_token,
        forbidden_tokens=forbidden_tokens,
        prompt_lengths=prompt_lengths,
        capacity=capacity,
        on_overflow=on_overflow,
    )
    return assemble(request, blocks(model, params, request, MAX_STEPS))


def predict(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    steps: int,
    *,
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
) -> Float[Array, "B steps V"]:
    """The raw logits of the next `steps` tokens, each fed back by its argmax.

    The capacity is that of `generate`, past which a model rolls.

    Raises:
      UserError: as `generate`; a learned position table that the prompt and steps pass.
    """
    request = Request(
        model.cfg,
        prompt,
        max_new_tokens=steps,
        key=jax.random.key(0),
        temperature=0,
        prompt_lengths=prompt_lengths,
        on_overflow="error" if model.cfg.has_position_table else "continue",
    )
    model, params = unrolled(model, params)
    state = start(model, params, request, capacities(model, params, request)[-1])
    return _predict(model, params, state, steps=power_of_two(steps))[:, :steps]


def blocks(model: LanguageModel, params: Params, request: Request, max_steps: int) -> Iterator[Block]:
    """The new tokens, up to `max_steps` (or a scan's block) at a time, until there are enough or all rows are done.

    The cache grows on the way where it is larger than the weights: a step reads all its slots, filled or not.
    """
    model, params = unrolled(model, params)
    rules, settings = request.rules, request.settings
    affordable = max(1, MAX_NOISE // (request.rows * model.cfg.vocab_size))
    size = min(MAX_BLOCK, power_of_two(request.max_new_tokens), power_of_two(affordable + 1) // 2)
    row_keys = _row_keys(request.key, request.rows)
    sizes = capacities(model, params, request)
    drawn: list[Block] = []
    step = 0
    if request.cached_steps:
        state = start(model, params, request, sizes[0])
    while step < request.cached_steps:
        room = request.cached_steps - step
        if len(sizes) > 1:  # whole blocks, for one that goes too far would overwrite the first slots
            room = (sizes[0] - request.longest + 1 - step) // size * size
        if room <= 0:
            sizes = sizes[1:]
            state = state._replace(cache=_grow(model, state.cache, sizes[0]))
            continue
        count = min(room, max(max_steps, size))
        state, tokens, log_probs = _advance(model, params, state, row_keys, settings, count, rules=rules, size=size)
        taken = min(int(state.step) - step, count)
        drawn.append(Block(np.asarray(tokens)[:, :taken], np.asarray(log_probs)[:, :taken]))
        yield drawn[-1]
        step += taken
        if taken < count:
            return
    if step < request.max_new_tokens:
        yield from recompute(model, params, request, drawn, max_steps)


@functools.partial(jax.jit, static_argnames=("model", "rules", "size"), donate_argnames=("state",))
def _advance(
    model: LanguageModel,
    params: Params,
    state: State,
    row_keys: Key[Array, " R"],
    settings: Settings,
    count: Int[Array, ""],
    *,
    rules: Rules,
    size: int,
) -> tuple[State, Int[Array, "R steps"], Float[Array, "R steps"]]:
    """Scans over blocks of `size` steps until `count` (at most MAX_STEPS) are taken or every row is done."""
    first, rows = state.step, state.token.shape[0]
    dtype = jnp.promote_types(model.cfg.dtype, jnp.float32)

    def one(state: State, noise: Float[Array, "R V"] | None):
        logits, cache = apply_cached(model, params, state.token, state.cache)
        token = choose(logits, noise, state.seen, rules, settings)
        token = jnp.where(state.done, settings.stop_token, token)
        log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.where(state.done, 0, log_prob)
        seen = None if state.seen is None else state.seen.at[jnp.arange(rows), token].set(True)
        done = state.done | (token == settings.stop_token)
        return State(cache, token, seen, done, state.step + 1), (token, log_prob)

    def block(carry):
        state, tokens, log_probs = carry
        at = state.step - first
        noise = None
        if not rules.greedy:
            noise = gumbel_noise(row_keys, state.step, size, model.cfg.vocab_size, dtype)
        state, (token, log_prob) = jax.lax.scan(one, state, noise, length=size)
        tokens = jax.lax.dynamic_update_slice(tokens, token.T, (jnp.int32(0), at))
        return state, tokens, jax.lax.dynamic_update_slice(log_probs, log_prob.T, (jnp.int32(0), at))

    def unfinished(carry):
        state = carry[0]
        return (state.step - first < count) & ~state.done.all()

    carry = state, jnp.zeros((rows, MAX_STEPS), jnp.int32), jnp.zeros((rows, MAX_STEPS), dtype)
    return jax.lax.while_loop(unfinished, block, carry)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _predict(model: LanguageModel, params: Params, state: State, *, steps: int) -> Float[Array, "B steps V"]:
    def one(carry, _):
        token, cache = carry
        logits, cache = apply_cached(model, params, token, cache)
        return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), logits

    logits = jax.lax.scan(one, (state.token, state.cache), length=steps)[1]
    return jnp.swapaxes(logits, 0, 1)


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(key: Key[Array, "*rows"], rows: int) -> Key[Array, " R"]:
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
