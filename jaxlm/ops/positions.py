"""Rotary (RoPE) and sinusoidal position encodings, as functions of absolute positions."""

from typing import Literal

import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def rope_angles(
    positions: Int[Array, "#B T"], head_dim: int, theta: float = 10000.0, dtype: DTypeLike = jnp.float32
) -> Float[Array, "#B T half"]:
    """Angles position * theta^(-2i/H) for i = 0 .. H/2 - 1, in radians.

    Args:
      positions: absolute positions in tokens.
      head_dim: H, even.
      theta: base of the frequencies.
      dtype: type of the result; float32 or wider, so that distant positions stay distinct.

    Source: Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
    return positions.astype(dtype)[..., None] * (theta**-exponents)[None, None]


def apply_rope(
    x: Float[Array, "B T heads H"],
    angles: Float[Array, "#B T half"],
    layout: Literal["half", "interleaved"] = "half",
) -> Float[Array, "B T heads H"]:
    """Rotates pairs of features by their angles. The result has the type of x.

    layout "half" pairs feature i with i + H/2 (Hugging Face), "interleaved" pairs 2i with 2i + 1 (Meta).
    Weights trained with one layout are wrong under the other until their columns are permuted.
    """
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
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
