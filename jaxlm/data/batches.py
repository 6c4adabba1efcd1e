"""Batches of a token split: windows that are a pure function of (seed, step), and every target once for evaluation."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer


def batch_starts(seed: Int[Array, ""] | int, step: Int[Array, ""] | int, size: int, places: int) -> Int[Array, " B"]:
    """Where the windows of a step's batch begin: `size` places in 0 .. places - 1, from (seed, step) alone.

    The windows of a run are numbered from 0, and window i begins at the fraction frac(offset + i * golden ratio) of
    the text: an additive recurrence (Weyl sequence), whose every stretch covers the text evenly, and whose offset is
    the seed's. Independent draws leave some text out and repeat other; at equal steps they train a little worse
    (docs/log.md). Up to 2^32 windows before the sequence repeats.
    """
    offset = jax.random.bits(jax.random.key(seed), (), jnp.uint32)
    window = jnp.asarray(step, jnp.uint32) * np.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
    fraction = window * np.uint32(0x9E3779B9) + offset  # in units of 2^-32; 2^32 over the golden ratio is 0x9E3779B9
    # floor(fraction * places / 2^32) by halves, as there is no 64-bit product without jax_enable_x64.
    high, low = fraction >> 16, fraction & 0xFFFF
    places_high, places_low = np.uint32(places >> 16), np.uint32(places & 0xFFFF)
    middle, other = high * places_low, low * places_high
    carry = ((middle & 0xFFFF) + (other & 0xFFFF) + ((low * places_low) >> 16)) >> 16
    return (high * places_high + (middle >> 16) + (other >> 16) + carry).astype(jnp.int32)


_host_starts = jax.jit(jax.vmap(batch_starts, (None, 0, None, None)), static_argnums=(2, 3))


def host_windows(tokens: np.ndarray, seed: int, first: int, count: int, size: int, seq_len: int) -> np.ndarray:
    """Windows [count, size, T + 1] of the steps first .. first + count - 1, read from a mapped file."""
    starts = np.asarray(_host_starts(seed, np.arange(first, first + count), size, len(tokens) - seq_len))
    return tokens[starts[..., None] + np.arange(seq_len + 1)]


def count_targets(tokens: np.ndarray, pad_token: int | None) -> int:
    """Tokens of a split that are predicted: all but the first of a stream [n], all but padding of rows [R, T + 1]."""
    return len(tokens) - 1 if tokens.ndim == 1 else int((tokens[:, 1:] != pad_token).sum())


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """Non-overlapping windows, or rows, with the weight of each target (0 where one is padded)."""

    windows: Integer[np.ndarray, "groups B T1"]
    weights: Float[np.ndarray, "groups B T"]


def eval_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, groups: int = 64, pad_token: int | None = None
) -> Iterator[EvalBatch]:
    """Cuts a stream [n] into windows of seq_len targets from position 0, the shorter remainder included; rows
    [R, seq_len + 1] are taken as they are.

    Every target (`count_targets`) is counted once. All batches have the same shape: `groups` batches of
    `batch_size` windows, or fewer when the whole split needs fewer.
    """
    total = -(-(len(tokens) - 1) // seq_len) if tokens.ndim == 1 else len(tokens)
    groups = min(groups, -(-total // batch_size))
    count = groups * batch_size
    for first in itertools.takewhile(lambda f: f < total, itertools.count(0, count)):
        if tokens.ndim == 1:
            piece = tokens[first * seq_len : (first + count) * seq_len + 1]
            padded = np.zeros(count * seq_len + 1, tokens.dtype)
            padded[: len(piece)] = piece
            starts = np.arange(count)[:, None] * seq_len
            windows = padded[starts + np.arange(seq_len + 1)]
            real = starts + np.arange(seq_len) < len(piece) - 1
        else:
            piece = tokens[first : first + count]
            windows = np.full((count, seq_len + 1), pad_token, tokens.dtype)
            windows[: len(piece)] = piece
            real = windows[:, 1:] != pad_token
        weights = real.astype(np.float32)
        yield EvalBatch(windows.reshape(groups, batch_size, seq_len + 1), weights.reshape(groups, batch_size, seq_len))
