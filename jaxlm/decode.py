"""Sampling: prefill the cache with the prompt, then one `lax.scan` over the new tokens."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.cache import KVCache
from jaxlm.errors import UserError
from jaxlm.modules import LanguageModel
from jaxlm.types import Logits, Params, Tokens

MIN_TEMPERATURE = 1e-6
"""Below it logits / temperature may overflow float32."""


class Generation(NamedTuple):
    """What `generate` drew, R = B * num_samples rows (a prompt's samples follow one another).

    tokens: [R, n] int32; slots after a stop token hold it again.
    log_probs: [R, n] log-probability in nats of each token under the model itself (before temperature and
      filters); 0 after the stop token.
    lengths: [R] tokens before the stop token.
    """

    tokens: Int[Array, "R n"]
    log_probs: Float[Array, "R n"]
    lengths: Int[Array, " R"]


def generate(
    model: LanguageModel,
    params: Params,
    prompt: Tokens | np.ndarray,
    *,
    max_new_tokens: int,
    key: Key[Array, "*rows"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
    stop_token: int | None = None,
) -> Generation:
    """Continues each prompt with `max_new_tokens` tokens drawn from softmax(logits / temperature).

    Row r draws token i with fold_in(fold_in(key, r), i), so the same key gives the same tokens. Past max_seq_len
    a transformer without a position table rolls: it sees the latest max_seq_len tokens of each layer's cache. A learned
    table cannot roll; there each token costs a forward pass over the latest max_seq_len tokens. A recurrent model
    keeps its state.

    Args:
      prompt: [B, P] token ids, P >= 1.
      key: a key, or [R] keys, one for each row.
      temperature: 0 is exactly greedy.
      top_k: draw among the k likeliest tokens.
      top_p: draw among the fewest likeliest tokens whose probabilities (after temperature and top_k) reach top_p.
      num_samples: rows drawn for each prompt; the prompt is run once.
      stop_token: a row that draws it is finished.

    Raises:
      UserError: an argument out of range, or prompt ids outside the vocabulary.
    """
    cfg = model.cfg
    ids = np.asarray(prompt)
    if ids.ndim != 2 or 0 in ids.shape:
        raise UserError(f"prompt has shape {ids.shape}: give [B, P] token ids with B and P at least 1")
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        raise UserError(f"prompt holds ids {ids.min()} to {ids.max()}: the vocabulary has 0 to {cfg.vocab_size - 1}")
    if max_new_tokens < 1 or num_samples < 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"max_new_tokens = {max_new_tokens}, num_samples = {num_samples}, top_k = {top_k}: give at least 1"
        )
    if not (temperature == 0 or temperature >= MIN_TEMPERATURE) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(
            f"temperature = {temperature}, top_p = {top_p}: give temperature 0 (greedy) or at least {MIN_TEMPERATURE}, "
            "and 0 < top_p <= 1"
        )
    if stop_token is not None and not 0 <= stop_token < cfg.vocab_size:
        raise UserError(f"stop_token = {stop_token}: the vocabulary has 0 to {cfg.vocab_size - 1}")
    rows = ids.shape[0] * num_samples
    if key.shape not in ((), (rows,)):
        raise UserError(f"key has shape {key.shape}: give one key, or one for each of the {rows} rows")
    if cfg.has_position_table and ids.shape[1] + max_new_tokens - 1 > cfg.max_seq_len:
        warnings.warn(
            f"prompt {ids.shape[1]} + {max_new_tokens} new tokens pass the learned position table "
            f"(max_seq_len = {cfg.max_seq_len}): from there each token recomputes the latest {cfg.max_seq_len}",
            stacklevel=2,
        )
    return _generate(
        model,
        params,
        jnp.asarray(ids, jnp.int32),
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)) if key.ndim == 0 else key,
        jnp.float32(temperature or 1.0),
        jnp.float32(1.0 if top_p is None else top_p),
        jnp.int32(-1 if stop_token is None else stop_token),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        top_k=None if top_k is None else min(top_k, cfg.vocab_size),
        filter_top_p=top_p is not None,
        num_samples=num_samples,
    )


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "greedy", "top_k", "filter_top_p", "num_samples")
)
def _generate(
    model: LanguageModel,
    params: Params,
    prompt: Tokens,
    row_keys: Key[Array, " R"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    stop_token: Int[Array, ""],
    *,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    filter_top_p: bool,
    num_samples: int,
) -> Generation:
    cfg, prompt_len = model.cfg, prompt.shape[1]
    apply = cast(Callable[..., tuple[Logits, KVCache]], functools.partial(model.apply, {"params": params}))

    def draw(logits: Float[Array, "R V"], done: Bool[Array, " R"], i: Int[Array, ""] | int):
        filtered = filter_logits(logits / temperature, top_k, top_p if filter_top_p else None)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, i)
        token = jnp.argmax(logits, -1) if greedy else jax.vmap(jax.random.categorical)(keys, filtered)
        token = jnp.where(done, stop_token, token.astype(jnp.int32))
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return token, jnp.where(done, 0, log_prob), done | (token == stop_token)

    # A learned table serves only as many tokens as it has places; without one the cache rolls.
    places = cfg.max_seq_len - prompt_len + 1 if cfg.has_position_table else max_new_tokens
    cached = min(max(places, 0), max_new_tokens)
    done = jnp.zeros(prompt.shape[0] * num_samples, bool)
    history = jnp.repeat(prompt, num_samples, axis=0)
    log_probs: list[Float[Array, "R part"]] = []
    if cached:
        cache = model.init_cache(prompt.shape[0], min(prompt_len + max_new_tokens, cfg.max_seq_len))
        logits, cache = apply(prompt, cache=cache)
        logits, cache = jax.tree.map(lambda a: jnp.repeat(a, num_samples, axis=0), (logits[:, -1], cache))
        token, log_prob, done = draw(logits, done, 0)

        def cached_step(carry, i):
            token, cache, done = carry
            logits, cache = apply(token[:, None], cache=cache)
            token, log_prob, done = draw(logits[:, 0], done, i)
            return (token, cache, done), (token, log_prob)

        (_, _, done), (tokens, probs) = jax.lax.scan(cached_step, (token, cache, done), jnp.arange(1, cached))
        history = jnp.concatenate([history, token[:, None], tokens.T], axis=1)
        log_probs += [log_prob[:, None], probs.T]
    if cached < max_new_tokens:

        def sliding_step(carry, i):
            context, done = carry
            token, log_prob, done = draw(apply(context)[0][:, -1], done, i)
            return (jnp.concatenate([context[:, 1:], token[:, None]], axis=1), done), (token, log_prob)

        context = history[:, -cfg.max_seq_len :]
        _, (tokens, probs) = jax.lax.scan(sliding_step, (context, done), jnp.arange(cached, max_new_tokens))
        history = jnp.concatenate([history, tokens.T], axis=1)
        log_probs.append(probs.T)
    tokens = history[:, prompt_len:]
    return Generation(tokens, jnp.concatenate(log_probs, axis=1), jnp.cumprod(tokens != stop_token, axis=1).sum(axis=1))


def filter_logits(
    logits: Float[Array, "R V"], top_k: int | None, top_p: Float[Array, ""] | float | None
) -> Float[Array, "R V"]:
    """-inf for the tokens that top-k and then top-p leave out; ties with the last one kept stay in."""
    if top_k is not None:
        threshold = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered)
        kept = jnp.cumsum(probs, axis=-1) - probs < top_p  # what came before has not reached top_p
        kept = kept.at[:, 0].set(True)  # also where top_p is 0 in float32
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits
