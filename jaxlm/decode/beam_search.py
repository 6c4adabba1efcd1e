"""Beam search over the cached model."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxlm.config import SamplingParams
from jaxlm.decode.capacity import cache_capacities, plan_capacity, power_of_two
from jaxlm.decode.checks import check_count, check_finite, only_finite
from jaxlm.decode.filters import FilterValues
from jaxlm.decode.prefill import apply_cached, start
from jaxlm.decode.request import check_prompts
from jaxlm.errors import UserError
from jaxlm.model.cache import Cache
from jaxlm.model.layer_stack import unrolled
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Count, Number, Params, TokenIds, Tokens


class Beams(NamedTuple):
    """The result of `beam_search`: W hypotheses for each prompt, best first.

    tokens: [B, W, n] int32; slots after a stop token hold it again.
    scores: [B, W] log-probability in nats over length ** length_penalty; -inf where there are fewer hypotheses.
    lengths: [B, W] tokens before the stop token.
    """

    tokens: Int[Array, "B W n"]
    scores: Float[Array, "B W"]
    lengths: Int[Array, "B W"]


class Hypotheses(NamedTuple):
    """Continuations of each prompt, best first; -inf in `scores` marks an empty place."""

    tokens: Int[Array, "B W places"]
    scores: Float[Array, "B W"]


class _State(NamedTuple):
    """The search after `step` new tokens.

    cache: row b * W + w belongs to live hypothesis w of prompt b.
    token: the last token of each live hypothesis, which the next step feeds.
    live: hypotheses without a stop token, by log-probability. Places from `step` on hold what was there last.
    finished: the best hypotheses that have ended with a stop token, by score (with the length penalty).
    step: new tokens of each live hypothesis.
    are_finite: for each prompt and new token, whether the logits of all hypotheses were.
    """

    cache: Cache
    token: Int[Array, "B W"]
    live: Hypotheses
    finished: Hypotheses
    step: Int[Array, ""]
    are_finite: Bool[Array, "B places"]


def beam_search(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    *,
    max_new_tokens: Count,
    beam_width: Count,
    length_penalty: Number = 1.0,
    stop_token: Count | TokenIds | None = None,
    forbidden_tokens: TokenIds = (),
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
) -> Beams:
    """The `beam_width` best continuations that a beam search finds, each ended by the stop token or n tokens long.

    Each step extends the W live hypotheses by every token and keeps the 2 W likeliest extensions. Those that end with
    the stop token compete for a place among the W best finished hypotheses; the W likeliest others stay live. (At most
    W of the 2 W can end, one for each live hypothesis, so W live ones remain.) A hypothesis of m tokens, its stop
    token included, scores log-probability / m ** length_penalty: 0 ranks by probability, more favours longer texts.
    At the end live hypotheses compete with finished ones; the search stops earlier when none of them could win.

    It may stand inside jax.jit and jax.vmap of a function of the parameters. There logits that are not finite are not
    refused: the search ends where they come.

    Args:
      forbidden_tokens: ids that no hypothesis contains. Scores stay the model's own log-probabilities: those of the
        other tokens are not scaled up.

    Raises:
      UserError: as `jaxlm.generate`; a width or penalty out of range; more tokens than a learned position table has.
      CheckError: as `jaxlm.generate`.

    Source: Wu et al. 2016, https://arxiv.org/abs/1609.08144, section 7; the penalty is that of transformers.
    """
    beam_width = check_count("beam_width", beam_width)
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    penalty: Any = length_penalty
    penalty = penalty.item() if getattr(penalty, "shape", None) == () else penalty
    if not isinstance(penalty, int | float) or isinstance(penalty, bool) or not 0 <= penalty < float("inf"):
        raise UserError(f"length_penalty = {length_penalty!r}: give a finite number of at least 0")
    chosen: dict[str, Any] = {"stop_token": stop_token, "forbidden_tokens": forbidden_tokens}
    options = SamplingParams(max_new_tokens=max_new_tokens, **chosen)
    options.check_vocabulary(model.cfg.vocab_size)
    prompts = check_prompts(model.cfg.vocab_size, prompt, prompt_lengths, num_samples=beam_width)
    plan = plan_capacity(model.cfg, prompts.longest, max_new_tokens, on_overflow="roll")
    model, params = unrolled(model, params)
    capacity = cache_capacities(model.cfg, params, prompts.rows, prompts.longest, plan)[-1]
    begin = start(model, params, prompts, capacity)
    values = FilterValues.of(options, model.cfg.vocab_size)
    best, are_finite = _search(
        model,
        params,
        begin.cache,
        begin.token,
        np.asarray(penalty, np.float64),
        values.stops,
        values.forbidden,
        max_new_tokens,
        places=power_of_two(max_new_tokens),
        width=beam_width,
    )
    check_finite(are_finite, params)
    tokens = best.tokens[:, :, :max_new_tokens]
    return Beams(tokens, best.scores, jnp.cumprod(~jnp.asarray(values.stops)[tokens], axis=-1).sum(axis=-1))


@functools.partial(jax.jit, static_argnames=("model", "places", "width"))
def _search(
    model: LanguageModel,
    params: Params,
    cache: Cache,
    token: Int[Array, " R"],
    penalty: Float[Array, ""],
    stops: Bool[Array, " V"],
    forbidden: Bool[Array, " V"],
    steps: Int[Array, ""],
    *,
    places: int,
    width: int,
) -> tuple[Hypotheses, Bool[Array, "B places"]]:
    """The best hypotheses of up to `steps` tokens, in `places` >= steps: other lengths share the program.

    The search ends where logits are not finite, which the second result says for each prompt and token.

    Args:
      cache, token: of R = B * W rows, the W of a prompt alike.
    """
    vocab_size = model.cfg.vocab_size
    dtype = jnp.promote_types(model.cfg.dtype, jnp.float32)
    batch = token.shape[0] // width

    def with_penalty(log_probs: Float[Array, "B some"], length: Int[Array, ""] | int) -> Float[Array, "B some"]:
        return log_probs / jnp.asarray(length, dtype) ** penalty.astype(dtype)

    def best_of(kept: Hypotheses, new: Hypotheses) -> Hypotheses:
        tokens, scores = (jnp.concatenate(pair, axis=1) for pair in zip(kept, new, strict=True))
        scores, chosen = jax.lax.top_k(scores, width)
        return Hypotheses(jnp.take_along_axis(tokens, chosen[..., None], axis=1), scores)

    def extend(state: _State) -> _State:
        logits, cache = apply_cached(model, params, rearrange(state.token, "B W -> (B W)"), state.cache)
        log_probs = jax.nn.log_softmax(only_finite(logits))
        # Of a row with NaN or infinity all are NaN, so one says it for all.
        sound = jnp.isfinite(log_probs[:, 0].reshape(batch, width)).all(axis=1)
        log_probs = jnp.where(forbidden[None], -jnp.inf, log_probs)
        log_probs = rearrange(log_probs, "(B W) V -> B W V", W=width) + state.live.scores[..., None]
        # The likeliest of all W * V extensions of a prompt: which hypothesis each extends, and by which token.
        log_probs, extension = jax.lax.top_k(
            rearrange(log_probs, "B W V -> B (W V)"), min(2 * width, width * vocab_size)
        )
        parent, token = extension // vocab_size, (extension % vocab_size).astype(jnp.int32)
        tokens = jnp.take_along_axis(state.live.tokens, parent[..., None], axis=1)
        # The new token fills all places from here on: later ones overwrite it, and a stop token is to be repeated.
        tokens = jnp.where(jnp.arange(places)[None, None] >= state.step, token[..., None], tokens)
        ends = stops[token]
        scores = jnp.where(ends, with_penalty(log_probs, state.step + 1), -jnp.inf)
        finished = best_of(state.finished, Hypotheses(tokens, scores))
        log_probs, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), width)
        choose = functools.partial(jnp.take_along_axis, indices=chosen, axis=1)
        # A hypothesis goes on from its parent's cache; one parent may have several children, another none.
        rows = rearrange(jnp.arange(batch)[:, None] * width + choose(parent), "B W -> (B W)")
        cache = jax.tree.map(lambda leaf: leaf[rows], cache)
        live = Hypotheses(jnp.take_along_axis(tokens, chosen[..., None], axis=1), log_probs)
        are_finite = state.are_finite.at[:, state.step].set(sound)
        return _State(cache, choose(token), live, finished, state.step + 1, are_finite)

    def may_improve(state: _State) -> Bool[Array, ""]:
        # A log-probability (at most 0) only falls, and is divided by at most steps ** penalty: this bounds the score
        # of everything that the best live hypothesis can become.
        bound = with_penalty(state.live.scores[:, :1], steps)
        return (state.step < steps) & jnp.any(bound > state.finished.scores[:, -1:]) & state.are_finite.all()

    none = Hypotheses(jnp.zeros((batch, width, places), jnp.int32), jnp.full((batch, width), -jnp.inf, dtype))
    # All W rows of a prompt begin alike. Only one may be extended, or the beam would hold each continuation W times.
    first = Hypotheses(none.tokens, none.scores.at[:, 0].set(0.0))
    state = _State(
        cache, rearrange(token, "(B W) -> B W", W=width), first, none, jnp.int32(0), jnp.ones((batch, places), bool)
    )
    state = jax.lax.while_loop(may_improve, extend, state)
    # Where the search stopped early, live hypotheses are too short to be an answer (and could not have won).
    scores = jnp.where(state.step == steps, with_penalty(state.live.scores, steps), -jnp.inf)
    return best_of(state.finished, Hypotheses(state.live.tokens, scores)), state.are_finite
