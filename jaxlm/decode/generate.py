"""Cached decoding: prefill, then scans over blocks of new tokens until every row is done.

A program is compiled for a batch size, a bucket of prompt lengths, a bucket of capacities and the filters that act
(`FilterFlags`). Temperatures and other filter values, and the number of new tokens from 5 on, are arguments of it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.decode.capacity import cache_capacities, plan_capacity, power_of_two
from jaxlm.decode.checks import check_count, check_finite
from jaxlm.decode.filters import FilterFlags, FilterValues, gumbel_noise, sample_token
from jaxlm.decode.generation import Generation, TokenBlock, join_blocks
from jaxlm.decode.prefill import State, apply_cached, grow, start
from jaxlm.decode.request import Request, check_prompts, request_from
from jaxlm.decode.uncached import recompute
from jaxlm.model.layer_stack import unrolled
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import target_log_probs
from jaxlm.types import Count, Number, Params, TokenIds, Tokens

MAX_STEPS = 256
"""New tokens that a call of the compiled loop returns at most: between calls the host sees which rows are done."""
MAX_BLOCK, MAX_NOISE = 8, 1 << 17
"""The noise of a block of steps is computed at once: at most so many steps, and so many numbers. On a CPU one step's
random bits cost as much as a layer (docs/log.md)."""


def generate(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    *,
    max_new_tokens: Count,
    key: Key[Array, "*rows"],
    temperature: Number = 1.0,
    top_k: Count | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    num_samples: Count = 1,
    stop_token: Count | TokenIds | None = None,
    forbidden_tokens: TokenIds = (),
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    capacity: Count | None = None,
    on_overflow: Literal["continue", "error"] = "continue",
) -> Generation:
    """Continues each prompt with `max_new_tokens` tokens sampled from softmax(logits / temperature), filtered.

    Row r samples token i with fold_in(fold_in(key, r), i), by `jax.random.categorical`: the same key gives the same
    tokens, also from `generate_naive` and `stream`, in another batch, and for a row alone (with its own key).

    All work stops once every row has its stop token. `jaxlm.config.SamplingParams` describes the arguments that are
    not below: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, forbidden_tokens. Numbers may be
    scalar arrays of NumPy or JAX, several ids an array.

    Args:
      prompt: [B, P] token ids, P >= 1.
      key: a `jax.random.key`, or [R] of them, one for each row.
      num_samples: rows sampled for each prompt; the prompt is run once.
      stop_token: id that ends a row, or several.
      prompt_lengths: [B] real tokens of each right-padded prompt; None = all P.
      capacity: tokens the cache holds; None = min(prompt + new, max_seq_len). Past it, with on_overflow="continue", a
        model without a position table rolls: it is the one whose every window is min(W, capacity). A learned table
        cannot roll; there each token costs a forward pass over the latest `capacity` tokens. Recurrent models and
        bigrams never overflow.
      on_overflow: "error" refuses before anything is computed.

    Raises:
      UserError: an argument out of range, prompt ids outside the vocabulary, or an overflow that is refused.
      CheckError: the model's logits are not finite, as with a parameter that is not; with the row and the first token.

    Warns:
      PositionTableWarning: the new tokens go on past a learned position table.
      ContextWarning: they go on past max_seq_len without such a table, and no capacity is given.
    """
    request = request_from(
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
    blocks = generate_blocks(model, params, request, MAX_STEPS)
    return join_blocks(blocks, request.max_new_tokens, request.values.stops)


def predict(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    steps: Count,
    *,
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
) -> Float[Array, "B steps V"]:
    """The raw logits of the next `steps` tokens, where each step feeds the likeliest token of the one before.

    The capacity is that of `generate`, past which a model rolls. It may stand inside jax.jit and jax.vmap of a function
    of the parameters. There logits that are not finite are not refused.

    Raises:
      UserError: as `generate`; more tokens than a learned position table has places.
      CheckError: as `generate`.
    """
    steps = check_count("steps", steps)
    prompts = check_prompts(model.cfg.vocab_size, prompt, prompt_lengths)
    plan = plan_capacity(model.cfg, prompts.longest, steps, on_overflow="roll")
    model, params = unrolled(model, params)
    capacity = cache_capacities(model.cfg, params, prompts.rows, prompts.longest, plan)[-1]
    state = start(model, params, prompts, capacity)
    logits, are_finite = _predict(model, params, state, steps=power_of_two(steps))
    check_finite(are_finite[:, :steps], params)
    return logits[:, :steps]


def generate_blocks(model: LanguageModel, params: Params, request: Request, max_steps: int) -> Iterator[TokenBlock]:
    """The new tokens, up to `max_steps` (or a scan's block) at a time, until there are enough or all rows are done.

    The cache grows on the way where it is larger than the weights: a step reads all its slots, filled or not.
    """
    model, params = unrolled(model, params)
    prompts, plan = request.prompts, request.plan
    affordable = max(1, MAX_NOISE // (prompts.rows * model.cfg.vocab_size))
    size = min(MAX_BLOCK, power_of_two(request.max_new_tokens), power_of_two(affordable + 1) // 2)
    row_keys = _row_keys(request.key, prompts.rows)
    capacities = cache_capacities(model.cfg, params, prompts.rows, prompts.longest, plan)
    blocks: list[TokenBlock] = []
    step = 0
    if plan.cached_steps:
        state = start(model, params, prompts, capacities[0], with_seen=request.flags.repetition_penalty)
    while step < plan.cached_steps:
        count = plan.cached_steps - step
        if len(capacities) > 1:
            # The scan runs whole blocks. One that goes past the end of a cache that is still to grow would overwrite
            # its first slots, so it takes only the blocks that fit.
            count = min(count, (capacities[0] - prompts.longest + 1 - step) // size * size)
        if count <= 0:
            capacities = capacities[1:]
            state = state._replace(cache=grow(model, state.cache, capacities[0]))
            continue
        count = min(count, max(max_steps, size))
        state, tokens, log_probs = _advance(
            model, params, state, row_keys, request.values, count, flags=request.flags, size=size
        )
        # Fewer steps than asked for mean that every row is done; more come from the last block, and are cut off.
        taken = min(int(state.step) - step, count)
        blocks.append(TokenBlock(np.asarray(tokens)[:, :taken], np.asarray(log_probs)[:, :taken]))
        check_finite(np.isfinite(blocks[-1].log_probs), params, step)
        yield blocks[-1]
        step += taken
        if taken < count:
            return
    if step < request.max_new_tokens:
        yield from recompute(model, params, request, blocks, max_steps)


@functools.partial(jax.jit, static_argnames=("model", "flags", "size"), donate_argnames=("state",))
def _advance(
    model: LanguageModel,
    params: Params,
    state: State,
    row_keys: Key[Array, " R"],
    values: FilterValues,
    count: Int[Array, ""],
    *,
    flags: FilterFlags,
    size: int,
) -> tuple[State, Int[Array, "R steps"], Float[Array, "R steps"]]:
    """Scans over blocks of `size` steps until `count` (at most MAX_STEPS) are taken or every row is done.

    A scan cannot stop early and a while loop cannot be handed the noise of several steps, so a while loop runs over
    scans: it looks once a block whether to go on, and computes the block's noise at once.
    """
    first, rows = state.step, state.token.shape[0]
    dtype = jnp.promote_types(model.cfg.dtype, jnp.float32)

    def one_step(state: State, noise: Float[Array, "R V"] | None):
        logits, cache = apply_cached(model, params, state.token, state.cache)
        token = sample_token(logits, noise, state.seen, flags, values)
        token = jnp.where(state.done, state.token, token)  # a row that is done keeps its place and its stop token
        log_prob = jnp.where(state.done, 0, target_log_probs(logits, token, or_nan=True))
        seen = None if state.seen is None else state.seen.at[jnp.arange(rows), token].set(True)
        done = state.done | values.stops[token]
        return State(cache, token, seen, done, state.step + 1), (token, log_prob)

    def one_block(carry):
        state, tokens, log_probs = carry
        at = state.step - first
        noise = None
        if not flags.greedy:
            noise = gumbel_noise(row_keys, state.step, size, model.cfg.vocab_size, dtype)
        state, (token, log_prob) = jax.lax.scan(one_step, state, noise, length=size)
        tokens = jax.lax.dynamic_update_slice(tokens, token.T, (jnp.int32(0), at))
        return state, tokens, jax.lax.dynamic_update_slice(log_probs, log_prob.T, (jnp.int32(0), at))

    def is_unfinished(carry) -> Bool[Array, ""]:
        state = carry[0]
        return (state.step - first < count) & ~state.done.all()

    carry = state, jnp.zeros((rows, MAX_STEPS), jnp.int32), jnp.zeros((rows, MAX_STEPS), dtype)
    return jax.lax.while_loop(is_unfinished, one_block, carry)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _predict(
    model: LanguageModel, params: Params, state: State, *, steps: int
) -> tuple[Float[Array, "B steps V"], Bool[Array, "B steps"]]:
    """The logits of each step, and whether all of a step's are finite."""

    def one_step(carry, _):
        token, cache = carry
        logits, cache = apply_cached(model, params, token, cache)
        return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), logits

    logits = jax.lax.scan(one_step, (state.token, state.cache), length=steps)[1]
    return rearrange(logits, "steps B V -> B steps V"), rearrange(jnp.isfinite(logits).all(-1), "steps B -> B steps")


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(key: Key[Array, "*rows"], rows: int) -> Key[Array, " R"]:
    """The key of each row: fold_in(key, row), unless there is one for each already."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
