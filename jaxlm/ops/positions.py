"""Rotary (RoPE) and sinusoidal position encodings, as functions of absolute positions."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class RopeScaling(NamedTuple):
    """How RoPE's frequencies change where a model reads more tokens than it was first trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    """Frequencies are divided by it, all of them (linear) or the slow ones."""
    original_len: int
    """Context in tokens before it was extended."""
    ramp: tuple[float, float]
    """(slow, fast), in turns within original_len: slower frequencies are divided, faster ones stay."""


def rope_frequencies(width: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> np.ndarray:
    """RoPE's frequencies theta^(-2i/width), i = 0 .. width/2 - 1, in radians a token, float64.

    Sources: Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2; linear: Chen et al. 2023,
    https://arxiv.org/abs/2306.15595; llama3: Llama 3.1 (a ramp over turns); yarn: Peng et al. 2023,
    https://arxiv.org/abs/2309.00071, section 3.2, with the ramp over i between whole numbers, as its authors' code.
    """
    plain = theta ** (-np.arange(0, width, 2) / width)
    if scaling is None:
        return plain
    slow, fast = scaling.ramp
    if scaling.kind == "linear":
        kept = np.zeros_like(plain)
    elif scaling.kind == "llama3":
        turns = scaling.original_len * plain / (2 * math.pi)
        kept = np.clip((turns - slow) / (fast - slow), 0, 1)
    else:

        def index(turns: float) -> float:  # of the frequency that turns so often
            return width * math.log(scaling.original_len / (2 * math.pi * turns)) / (2 * math.log(theta))

        first, last = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), width - 1)
        kept = 1 - np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rope_angles(
    positions: Int[Array, "#B T"],
    width: int,
    theta: float = 10000.0,
    dtype: DTypeLike = jnp.float32,
    scaling: RopeScaling | None = None,
) -> Float[Array, "#B T half"]:
    """Angles position * frequency in radians, one for each pair of features.

    Args:
      positions: absolute positions in tokens.
      width: number of features that are rotated, even.
      theta: base of the frequencies, scaling: how they change; see `rope_frequencies`.
      dtype: type of the result; float32 or wider, so that distant positions stay distinct.
    """
    frequencies = jnp.asarray(rope_frequencies(width, theta, scaling), dtype)
    return positions.astype(dtype)[..., None] * frequencies[None, None]


def apply_rope(
    x: Float[Array, "B T heads H"],
    angles: Float[Array, "#B T half"],
    layout: Literal["half", "interleaved"] = "half",
    magnitude: float = 1.0,
) -> Float[Array, "B T heads H"]:
    """Rotates pairs of features by their angles and multiplies them by `magnitude`. The result has the type of x.

    With fewer angles than pairs only the first features are rotated; the others stay as they are.

    layout "half" pairs feature i with i + half (Hugging Face), "interleaved" pairs 2i with 2i + 1 (Meta).
    Weights trained with one layout are wrong under the other until their columns are permuted.
    """
    rotated_width = 2 * angles.shape[-1]
    if rotated_width < x.shape[-1]:
        rotated = apply_rope(x[..., :rotated_width], angles, layout, magnitude)
        return jnp.concatenate([rotated, x[..., rotated_width:]], axis=-1)
    cos, sin = (magnitude * turn(angles)[:, :, None, :] for turn in (jnp.cos, jnp.sin))
    wide = x.astype(angles.dtype)
    if layout == "half":
        a, b = jnp.split(wide, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
        rotated = rearrange([a * cos - b * sin, b * cos + a * sin], "pair b t heads half -> b t heads (half pair)")
    return rotated.astype(x.dtype)


def sinusoids(positions: Int[Array, "#B T"], embed_dim: int, dtype: DTypeLike = jnp.float32) -> Float[Array, "#B T D"]:
    """Fixed position vectors: feature 2i is sin(position / 10000^(2i/D)), feature 2i + 1 its cosine; D even.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5.
    """
    angles = rope_angles(positions, embed_dim, 10000.0, dtype)
    return rearrange([jnp.sin(angles), jnp.cos(angles)], "pair b t half -> b t (half pair)")
