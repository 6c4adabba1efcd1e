"""A checked request for new tokens: the prompts, how each token is chosen, and how far the cache reaches."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxlm.config import ModelConfig, SamplingParams
from jaxlm.decode.capacity import CapacityPlan, plan_capacity
from jaxlm.decode.checks import check_count, check_ids
from jaxlm.decode.filters import FilterFlags, FilterValues
from jaxlm.errors import UserError
from jaxlm.sharding.mesh import find_devices
from jaxlm.types import Count, Tokens


class Prompts(NamedTuple):
    """A batch of prompts that `check_prompts` has found sound.

    ids: [B, P] int32, P the longest prompt's length; 0 where a shorter one is padded on the right.
    lengths: [B] real tokens of each.
    num_samples: rows that continue each prompt; they follow one another.
    """

    ids: Int[np.ndarray, "B P"]
    lengths: Int[np.ndarray, " B"]
    num_samples: int

    @property
    def rows(self) -> int:
        """R = B * num_samples."""
        return len(self.lengths) * self.num_samples

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.ids.shape[1]


def check_prompts(
    vocab_size: int,
    prompt: Tokens,
    lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    num_samples: Count = 1,
) -> Prompts:
    """The prompts as NumPy arrays without superfluous padding.

    Raises:
      UserError: JAX finds no devices; not [B, P] integers, lengths that do not fit them, ids outside the vocabulary,
        num_samples below 1.
    """
    find_devices()
    ids = np.asarray(prompt)
    if ids.ndim != 2 or 0 in ids.shape:
        raise UserError(f"prompt has shape {ids.shape}: give [B, P] token ids with B and P at least 1")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"prompt has type {ids.dtype}: give integer token ids")
    batch, width = ids.shape
    real_lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
    if real_lengths.shape != (batch,) or not np.issubdtype(real_lengths.dtype, np.integer):
        raise UserError(f"prompt_lengths = {real_lengths.tolist()}: give one integer for each of the {batch} prompts")
    if real_lengths.min() < 1 or real_lengths.max() > width:
        raise UserError(f"prompt_lengths = {real_lengths.tolist()}: each must be 1 to the prompt's width {width}")
    is_real = np.arange(width)[None] < real_lengths[:, None]
    check_ids("prompt", ids[is_real], vocab_size)
    num_samples = check_count("num_samples", num_samples)
    longest = int(real_lengths.max())
    return Prompts(np.where(is_real, ids, 0)[:, :longest].astype(np.int32), real_lengths, num_samples)


class Request(NamedTuple):
    """What a sampler is asked for; `make_request` makes it."""

    prompts: Prompts
    max_new_tokens: int
    key: Key[Array, "*rows"]
    flags: FilterFlags
    values: FilterValues
    plan: CapacityPlan


def make_request(
    cfg: ModelConfig,
    prompt: Tokens,
    sampling: SamplingParams,
    *,
    key: Key[Array, "*rows"],
    num_samples: Count = 1,
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    capacity: Count | None = None,
    on_overflow: Literal["continue", "error"] = "continue",
) -> Request:
    """Checks all that `jaxlm.generate` takes besides the model; it documents each argument.

    Raises:
      UserError: an argument out of range, prompt ids outside the vocabulary, or an overflow that is refused.
    """
    prompts = check_prompts(cfg.vocab_size, prompt, prompt_lengths, num_samples)
    sampling.check_vocabulary(cfg.vocab_size)
    if on_overflow not in ("continue", "error"):
        raise UserError(f"on_overflow = {on_overflow!r}: give 'continue' or 'error'")
    kind = getattr(key, "dtype", type(key).__name__)
    if not (isinstance(key, jax.Array) and jnp.issubdtype(kind, jax.dtypes.prng_key)):
        raise UserError(f"key has type {kind}: give jax.random.key(seed)")
    if key.shape not in ((), (prompts.rows,)):
        raise UserError(f"key has shape {key.shape}: give one key, or one for each of the {prompts.rows} rows")
    return Request(
        prompts,
        sampling.max_new_tokens,
        key,
        FilterFlags.of(sampling, cfg.vocab_size),
        FilterValues.of(sampling, cfg.vocab_size),
        plan_capacity(cfg, prompts.longest, sampling.max_new_tokens, capacity, on_overflow),
    )


def request_from(
    cfg: ModelConfig,
    prompt: Tokens,
    *,
    key: Key[Array, "*rows"],
    num_samples: Count = 1,
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    capacity: Count | None = None,
    on_overflow: Literal["continue", "error"] = "continue",
    **sampling: Any,
) -> Request:
    """`make_request` of the arguments of `jaxlm.generate`, those of `SamplingParams` among them.

    Raises:
      UserError: as `make_request`.
    """
    if "seed" in sampling:
        raise UserError(f"seed = {sampling['seed']} is for the command: give key=jax.random.key({sampling['seed']})")
    params = SamplingParams(**sampling)
    return make_request(
        cfg,
        prompt,
        params,
        key=key,
        num_samples=num_samples,
        prompt_lengths=prompt_lengths,
        capacity=capacity,
        on_overflow=on_overflow,
    )
