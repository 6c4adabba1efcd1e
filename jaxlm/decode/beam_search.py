"""Beam search over the cached model."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.decode.prefill import apply_cached, capacities, start
from jaxlm.decode.request import Request, power_of_two
from jaxlm.errors import UserError
from jaxlm.model.cache import Cache
from jaxlm.model.layer_stack import unrolled
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens


class Beams(NamedTuple):
    """What `beam_search` found, W hypotheses a prompt, best first.

    tokens: [B, W, n] int32; slots after a stop token hold it again.
    scores: [B, W] log-probability in nats over length ** length_penalty; -inf where there are fewer hypotheses.
    lengths: [B, W] tokens before the stop token.
    """

    tokens: Int[Array, "B W n"]
    scores: Float[Array, "B W"]
    lengths: Int[Array, "B W"]


class _State(NamedTuple):
    """The search after `step` tokens: live hypotheses by log-probability, finished ones by score."""

    cache: Cache
    token: Int[Array, "B W"]
    live: Int[Array, "B W places"]
    log_probs: Float[Array, "B W"]
    finished: Int[Array, "B W places"]
    scores: Float[Array, "B W"]
    step: Int[Array, ""]


def beam_search(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    *,
    max_new_tokens: int,
    beam_width: int,
    length_penalty: float = 1.0,
    stop_token: int | None = None,
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
) -> Beams:
    """The `beam_width` likeliest continuations that a beam search finds, each ended by the stop token or n long.

    Each step extends the W live hypotheses and keeps, of the 2 W likeliest extensions, those that end with the stop
    token among the W best finished ones, and the W likeliest others live. A hypothesis of m tokens (its stop token
    included) scores log-probability / m ** length_penalty: 0 ranks by probability, more favours longer texts. At the
    end live ones compete with finished ones; the search stops before when none of them could win.

    Raises:
      UserError: as `jaxlm.generate`; a width or penalty out of range; a learned table that the tokens pass.

    Source: Wu et al. 2016, https://arxiv.org/abs/1609.08144, section 7; the penalty is that of transformers.
    """
    if beam_width < 1 or not 0 <= length_penalty < float("inf"):
        raise UserError(
            f"beam_width = {beam_width}, length_penalty = {length_penalty}: give a width of at least 1, a penalty of "
            "at least 0"
        )
    request = Request(
        model.cfg,
        prompt,
        max_new_tokens=max_new_tokens,
        key=jax.random.key(0),
        temperature=0,
        num_samples=beam_width,
        stop_token=stop_token,
        prompt_lengths=prompt_lengths,
        on_overflow="error" if model.cfg.has_position_table else "continue",
    )
    model, params = unrolled(model, params)
    begin = start(model, params, request, capacities(model, params, request)[-1])
    tokens, scores = _search(
        model,
        params,
        begin.cache,
        begin.token,
        np.asarray(length_penalty, np.float64),
        request.settings.stop_token,
        max_new_tokens,
        places=power_of_two(max_new_tokens),
        width=beam_width,
    )
    tokens = tokens[:, :, :max_new_tokens]
    lengths = jnp.cumprod(tokens != request.settings.stop_token, axis=-1).sum(axis=-1)
    return Beams(tokens, scores, lengths)


@functools.partial(jax.jit, static_argnames=("model", "places", "width"))
def _search(
    model: LanguageModel,
    params: Params,
    cache: Cache,
    token: Int[Array, " R"],
    penalty: Float[Array, ""],
    stop_token: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    places: int,
    width: int,
) -> tuple[Int[Array, "B W places"], Float[Array, "B W"]]:
    vocab_size = model.cfg.vocab_size
    candidates = min(2 * width, width * vocab_size)
    dtype = jnp.promote_types(model.cfg.dtype, jnp.float32)
    batch = token.shape[0] // width

    def scored(log_probs: Float[Array, "B some"], length: Int[Array, ""] | int) -> Float[Array, "B some"]:
        return log_probs / jnp.asarray(length, dtype) ** penalty.astype(dtype)

    def best(
        kept: tuple[Int[Array, "B W places"], Float[Array, "B W"]],
        new: tuple[Int[Array, "B some places"], Float[Array, "B some"]],
    ) -> tuple[Int[Array, "B W places"], Float[Array, "B W"]]:
        texts, scores = (jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True))
        scores, which = jax.lax.top_k(scores, width)
        return jnp.take_along_axis(texts, which[..., None], axis=1), scores

    def extend(state: _State) -> _State:
        logits, cache = apply_cached(model, params, state.token.reshape(-1), state.cache)
        log_probs = jax.nn.log_softmax(logits).reshape(batch, width, vocab_size)
        log_probs = (log_probs + state.log_probs[..., None]).reshape(batch, -1)
        log_probs, which = jax.lax.top_k(log_probs, candidates)
        parent, token = which // vocab_size, (which % vocab_size).astype(jnp.int32)
        texts = jnp.take_along_axis(state.live, parent[..., None], axis=1)
        texts = jnp.where(
            jnp.arange(places)[None, None] >= state.step, token[..., None], texts
        )  # a stop token fills up
        stopped = token == stop_token
        finished, scores = best(
            (state.finished, state.scores),
            (texts, jnp.where(stopped, scored(log_probs, state.step + 1), -jnp.inf)),
        )
        log_probs, which = jax.lax.top_k(jnp.where(stopped, -jnp.inf, log_probs), width)
        pick = functools.partial(jnp.take_along_axis, indices=which, axis=1)
        rows = (jnp.arange(batch)[:, None] * width + pick(parent)).reshape(-1)
        cache = jax.tree.map(lambda leaf: leaf[rows], cache)
        live = jnp.take_along_axis(texts, which[..., None], axis=1)
        return _State(cache, pick(token), live, log_probs, finished, scores, state.step + 1)

    def hopeful(state: _State) -> Bool[Array, ""]:
        possible = scored(state.log_probs[:, :1], steps)  # a log-probability only falls, its divisor is at most this
        return (state.step < steps) & jnp.any(possible > state.scores[:, -1:])

    texts = jnp.zeros((batch, width, places), jnp.int32)
    nothing = jnp.full((batch, width), -jnp.inf, dtype)
    one = nothing.at[:, 0].set(0.0)  # all begin alike: a single one is extended
    state = _State(cache, token.reshape(batch, width), texts, one, texts, nothing, jnp.int32(0))
    state = jax.lax.while_loop(hopeful, extend, state)
    complete = jnp.where(state.step == steps, scored(state.log_probs, steps), -jnp.inf)
    return best((state.finished, state.scores), (state.live, complete))
