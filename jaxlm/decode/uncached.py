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
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.decode.filters import Rules, Settings, filter_logits, penalise
from jaxlm.decode.request import Block, Generation, Request, assemble, power_of_two
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens


def generate_naive(model: LanguageModel, params: Params, prompt: Tokens, **arguments: Any) -> Generation:
    """`jaxlm.generate` with its arguments and result, recomputing the context for each token.

    A model that rolls past the capacity is run with every window at most the capacity, over the full history; one with
    a learned table sees the latest `capacity` tokens, at positions from 0.

    Raises:
      UserError: as `generate`.
    """
    request = Request(model.cfg, prompt, **arguments)
    return assemble(request, recompute(model, params, request, (), request.max_new_tokens))


def recompute(
    model: LanguageModel, params: Params, request: Request, drawn: Sequence[Block], max_steps: int
) -> Iterator[Block]:
    """The new tokens after those already drawn, up to `max_steps` at a time, until enough or all rows are done."""
    cfg, rows = model.cfg, request.rows
    if request.overflows and not cfg.has_position_table:
        windows = tuple(min(window or request.context, request.context) for window in cfg.window_period)
        model = model.clone(cfg=dataclasses.replace(cfg, window=windows))
    before = np.concatenate([np.zeros((rows, 0), np.int32), *(block.tokens for block in drawn)], axis=1)
    lengths = np.repeat(request.lengths, request.num_samples).astype(np.int32)
    history = np.zeros((rows, power_of_two(request.longest + request.max_new_tokens)), np.int32)
    history[:, : request.ids.shape[1]] = np.repeat(request.ids, request.num_samples, axis=0)
    for row, length in enumerate(lengths):
        history[row, length : length + before.shape[1]] = before[row]
    settings, step = request.settings, before.shape[1]
    done = (before == settings.stop_token).any(axis=1)
    context = min(request.context, history.shape[1]) if cfg.has_position_table else None
    while step < request.max_new_tokens and not done.all():
        count = min(max_steps, request.max_new_tokens - step)
        history, log_probs, end = _recompute(
            model,
            params,
            history,
            lengths,
            done,
            request.key,
            settings,
            step,
            count,
            rules=request.rules,
            context=context,
        )
        taken = int(end) - step
        at = lengths[:, None] + step + np.arange(taken)[None]
        tokens = np.take_along_axis(np.asarray(history), at, axis=1)
        done = done | (tokens == settings.stop_token).any(axis=1)
        yield Block(tokens, np.take_along_axis(np.asarray(log_probs), at, axis=1))
        step += taken


@functools.partial(jax.jit, static_argnames=("model", "rules", "context"))
def _recompute(
    model: LanguageModel,
    params: Params,
    history: Int[Array, "R places"],
    lengths: Int[Array, " R"],
    done: Bool[Array, " R"],
    key: Key[Array, "*rows"],
    settings: Settings,
    first: Int[Array, ""],
    count: Int[Array, ""],
    *,
    rules: Rules,
    context: int | None,
) -> tuple[Int[Array, "R places"], Float[Array, "R places"], Int[Array, ""]]:
    """Writes tokens into the history (right-padded rows), their log-probabilities beside them; where it stopped."""
    rows, places = history.shape
    row = jnp.arange(rows)

    def draw(carry):
        history, log_probs, done, step = carry
        length = lengths + step
        visible, last = history, length - 1
        if context is not None:  # the latest `context` tokens, from position 0
            begin = jnp.maximum(length - context, 0)
            visible = history[row[:, None], begin[:, None] + jnp.arange(context)[None]]
            last = last - begin
        logits = model.apply({"params": params}, visible)[0][row, last]
        past = jnp.arange(places)[None] < length[:, None]
        seen = jnp.zeros(logits.shape, bool).at[row[:, None], history].max(past)
        wanted = penalise(logits, seen, rules, settings)
        if rules.greedy:
            token = jnp.argmax(wanted, axis=-1)
        else:
            row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, row)
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
            wanted = filter_logits(wanted / settings.temperature.astype(wanted.dtype), rules, settings)
            token = jax.vmap(jax.random.categorical)(keys, wanted)
        token = jnp.where(done, settings.stop_token, token.astype(jnp.int32))
        log_prob = jnp.where(done, 0, jax.nn.log_softmax(logits)[row, token])
        history = history.at[row, length].set(token)
        log_probs = log_probs.at[row, length].set(log_prob)
        return history, log_probs, done | (token == settings.stop_token), step + 1

    def unfinished(carry):
        return (carry[3] < first + count) & ~carry[2].all()

    dtype = jnp.promote_types(model.cfg.dtype, jnp.float32)
    carry = history, jnp.zeros(history.shape, dtype), done, first
    history, log_probs, _, step = jax.lax.while_loop(unfinished, draw, carry)
    return history, log_probs, step
