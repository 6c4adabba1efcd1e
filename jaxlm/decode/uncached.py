"""Sampling without a cache: every token costs a forward pass over the whole context.

Slow and simple: what `generate` must agree with, and how a learned position table goes on past its last place.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.decode.capacity import power_of_two
from jaxlm.decode.checks import check_finite
from jaxlm.decode.filters import FilterFlags, FilterValues, filter_logits, penalise
from jaxlm.decode.generation import Generation, TokenBlock, join_blocks
from jaxlm.decode.request import Request, request_from
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.loss import target_log_probs
from jaxlm.types import Params, Tokens


def generate_naive(model: LanguageModel, params: Params, prompt: Tokens, **arguments: Any) -> Generation:
    """`jaxlm.generate` with its arguments and result, recomputing the context for each token.

    A model that rolls past the capacity is run with every window at most the capacity, over the full history; one with
    a learned position table sees the latest `capacity` tokens, at positions from 0.

    Raises:
      UserError: as `generate`.
    """
    request = request_from(model.cfg, prompt, **arguments)
    blocks = recompute(model, params, request, (), request.max_new_tokens)
    return join_blocks(blocks, request.max_new_tokens, request.values.stops)


def recompute(
    model: LanguageModel, params: Params, request: Request, earlier: Sequence[TokenBlock], max_steps: int
) -> Iterator[TokenBlock]:
    """The new tokens after the `earlier` ones, up to `max_steps` at a time, until enough or all rows are done."""
    cfg, prompts, values = model.cfg, request.prompts, request.values
    rows, capacity = prompts.rows, request.plan.capacity
    if request.plan.overflows and not cfg.has_position_table:
        # What a cache that rolls computes: each layer sees at most `capacity` keys, all at their true positions.
        windows = tuple(min(window or capacity, capacity) for window in cfg.window_period)
        model = model.clone(cfg=dataclasses.replace(cfg, window=windows))
    new = np.concatenate([np.zeros((rows, 0), np.int32), *(block.tokens for block in earlier)], axis=1)
    lengths = repeat(prompts.lengths, "B -> (B samples)", samples=prompts.num_samples).astype(np.int32)
    # The width is a power of two, so that requests of similar length share a program. Padding stands on the right,
    # where a causal model does not look.
    history = np.zeros((rows, power_of_two(prompts.longest + request.max_new_tokens)), np.int32)
    history[:, : prompts.longest] = repeat(prompts.ids, "B P -> (B samples) P", samples=prompts.num_samples)
    for row, length in enumerate(lengths):
        history[row, length : length + new.shape[1]] = new[row]
    step = new.shape[1]
    stops = np.asarray(values.stops)
    done = stops[new].any(axis=1)
    context = min(capacity, history.shape[1]) if cfg.has_position_table else None
    while step < request.max_new_tokens and not done.all():
        history, log_probs, end = _recompute(
            model,
            params,
            history,
            lengths,
            done,
            request.key,
            values,
            step,
            min(max_steps, request.max_new_tokens - step),
            flags=request.flags,
            context=context,
        )
        taken = int(end) - step
        places = lengths[:, None] + step + np.arange(taken)[None]
        tokens = np.take_along_axis(np.asarray(history), places, axis=1)
        done = done | stops[tokens].any(axis=1)
        block = TokenBlock(tokens, np.take_along_axis(np.asarray(log_probs), places, axis=1))
        check_finite(np.isfinite(block.log_probs), params, step)
        yield block
        step += taken


@functools.partial(jax.jit, static_argnames=("model", "flags", "context"))
def _recompute(
    model: LanguageModel,
    params: Params,
    history: Int[Array, "R places"],
    lengths: Int[Array, " R"],
    done: Bool[Array, " R"],
    key: Key[Array, "*rows"],
    values: FilterValues,
    first: Int[Array, ""],
    count: Int[Array, ""],
    *,
    flags: FilterFlags,
    context: int | None,
) -> tuple[Int[Array, "R places"], Float[Array, "R places"], Int[Array, ""]]:
    """Writes `count` new tokens, or fewer where all rows are done, into the right-padded rows of `history`.

    Args:
      lengths: [R] tokens of each prompt.
      first: index of the first new token to compute.
      context: tokens that the model sees at most; None = all.

    Returns: the history, the log-probability of each new token at its place, and the index after the last new token.
    """
    rows, places = history.shape
    row = jnp.arange(rows)

    def one_step(carry):
        history, log_probs, done, step = carry
        length = lengths + step
        visible, last = history, length - 1
        if context is not None:  # the latest `context` tokens, from position 0
            begin = jnp.maximum(length - context, 0)
            visible = history[row[:, None], begin[:, None] + jnp.arange(context)[None]]
            last = last - begin
        logits = model.apply({"params": params}, visible)[0][row, last]
        is_past = jnp.arange(places)[None] < length[:, None]
        seen = jnp.zeros(logits.shape, bool).at[row[:, None], history].max(is_past)
        # Written out with one key a row and token, where `sample_token` has the noise of many: the two must agree.
        filtered = penalise(logits, seen, flags, values)
        if flags.greedy:
            token = jnp.argmax(filtered, axis=-1)
        else:
            row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, row)
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
            filtered = filter_logits(filtered / values.temperature.astype(filtered.dtype), flags, values)
            token = jax.vmap(jax.random.categorical)(keys, filtered)
        token = jnp.where(done, history[row, length - 1], token.astype(jnp.int32))  # its stop token again
        log_prob = jnp.where(done, 0, target_log_probs(logits, token, or_nan=True))
        history = history.at[row, length].set(token)
        log_probs = log_probs.at[row, length].set(log_prob)
        return history, log_probs, done | values.stops[token], step + 1

    def is_unfinished(carry) -> Bool[Array, ""]:
        _, _, done, step = carry
        return (step < first + count) & ~done.all()

    dtype = jnp.promote_types(model.cfg.dtype, jnp.float32)
    carry = history, jnp.zeros(history.shape, dtype), done, first
    history, log_probs, _, step = jax.lax.while_loop(is_unfinished, one_step, carry)
    return history, log_probs, step
