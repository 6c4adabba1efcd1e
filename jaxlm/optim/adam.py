"""Adam and AdamW, with the two moments that they share with AdamSN."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.errors import UserError
from jaxlm.optim.param_kinds import mask_or_default
from jaxlm.optim.transforms import at_least_float32
from jaxlm.types import Number

EpsPlacement = Literal["outside", "uncorrected", "inside"]


class Subsets(NamedTuple):
    """How a leaf is cut into subsets that share a second moment: after a reshape to `shape`, a subset spans `axes`."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]


class ScaleByAdamState(NamedTuple):
    """The state of Adam and AdamSN.

    `mu` has the shapes of the parameters; so has `nu`, except for axes of length 1 where a subset shares one number.
    Both are in at least float32 (`mu` in mu_dtype if that is given).
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # optax's name for it, and a method of tuples
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    eps_placement: EpsPlacement = "outside",
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""The direction of Adam, which is then multiplied by minus the learning rate.

    With t from 1, all operations elementwise::

        u = b1 u + (1 - b1) g                   u_hat = u / (1 - b1^t)
        v = b2 v + (1 - b2) g^2                 v_hat = v / (1 - b2^t)
        outside:      u_hat / (sqrt(v_hat) + eps)         (torch, optax)
        uncorrected:  (sqrt(1 - b2^t) / (1 - b1^t)) u / (sqrt(v) + eps)
        inside:       u_hat / sqrt(v_hat + eps)

    Moments are at least float32, whatever the gradients are; updates have the gradients' types. The bias corrections
    keep full precision: `optax.scale_by_adam` computes 1 - 0.999^t in float32, which at t = 1 is wrong by 1e-5.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: where eps_placement says.
      bias_correction: False leaves out both corrections (u_hat = u, v_hat = v).
      mu_dtype: the type the first moment is kept in; None = at least float32. bfloat16 halves its memory. The second
        moment is never narrower: in bfloat16 a decay rate of 0.999 is 1.

    Source: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1.
    """

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: Subsets(leaf.shape, ()), tree)

    return scale_by_moments(whole, b1, b2, eps, eps_placement, bias_correction, mu_dtype)


def scale_by_moments(
    subsets_of: Callable[[Any], Any],
    b1: Number,
    b2: Number,
    eps: Number,
    eps_placement: EpsPlacement,
    bias_correction: bool,
    mu_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`scale_by_adam` whose second moment averages the sum of g^2 over each subset of a leaf."""
    if eps_placement not in ("outside", "uncorrected", "inside"):
        raise UserError(f"eps_placement = {eps_placement!r} is unknown: choose outside, uncorrected or inside")

    def init(params: optax.Params) -> ScaleByAdamState:
        def nu(leaf: Array, subsets: Subsets) -> Array:
            zeros = jnp.zeros_like(leaf, dtype=at_least_float32(leaf)).reshape(subsets.shape)
            return zeros.sum(subsets.axes, keepdims=True)

        mu = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=mu_dtype or at_least_float32(leaf)), params)
        return ScaleByAdamState(jnp.zeros((), jnp.int32), mu, jax.tree.map(nu, params, subsets_of(params)))

    def update(
        updates: optax.Updates, state: ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdamState]:
        count = optax.safe_increment(state.count)

        def mu(grad: Array, old: Array) -> Array:
            wide = at_least_float32(grad)
            return b1 * old.astype(wide) + (1 - b1) * grad.astype(wide)

        def nu(grad: Array, old: Array, subsets: Subsets) -> Array:
            squares = jnp.square(grad.astype(old.dtype)).reshape(subsets.shape)
            return b2 * old + (1 - b2) * squares.sum(subsets.axes, keepdims=True)

        def direction(grad: Array, mu: Array, nu: Array, subsets: Subsets) -> Array:
            mu = mu.reshape(subsets.shape)
            mu_correction, nu_correction = (
                (correction(b, count, mu.dtype) if bias_correction else 1) for b in (b1, b2)
            )
            if eps_placement == "inside":
                out = mu / mu_correction / jnp.sqrt(nu / nu_correction + eps)
            elif eps_placement == "uncorrected":
                out = mu * (jnp.sqrt(nu_correction) / mu_correction) / (jnp.sqrt(nu) + eps)
            else:
                out = mu / mu_correction / (jnp.sqrt(nu / nu_correction) + eps)
            return out.reshape(grad.shape).astype(grad.dtype)

        subsets = subsets_of(updates)
        mus = jax.tree.map(mu, updates, state.mu)
        nus = jax.tree.map(nu, updates, state.nu, subsets)
        directions = jax.tree.map(direction, updates, mus, nus, subsets)
        kept = jax.tree.map(lambda new, old: new.astype(old.dtype), mus, state.mu)
        return directions, ScaleByAdamState(count, kept, nus)

    return optax.GradientTransformation(init, update)


def correction(decay: Number, count: Int[Array, ""], dtype: DTypeLike) -> Float[Array, ""]:
    """1 - decay^count without cancellation, also where decay is 0."""
    return -jnp.expm1(count.astype(dtype) * jnp.log1p(jnp.asarray(decay - 1, dtype)))


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    eps_placement: EpsPlacement = "outside",
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Adam: p -= rate * `scale_by_adam`. Equal to `optax.adam` and to `torch.optim.Adam` by default."""
    return optax.chain(
        scale_by_adam(b1, b2, eps, eps_placement=eps_placement, bias_correction=bias_correction, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    mask: Any = None,
    *,
    kinds: Any = None,
    eps_placement: EpsPlacement = "outside",
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """AdamW: p -= rate * (`scale_by_adam` + weight_decay * p), the decay on matrices only.

    Args:
      learning_rate: the rate, or a schedule from the number of steps taken.
      weight_decay: decoupled decay; 1e-2 is torch's default, optax has 1e-4.
      mask: the leaves that decay, as a tree of bools or a function of the parameters; None = `decay_mask`, matrices
        only (optax and torch decay every leaf).
      kinds: the kinds that `decay_mask` uses, as in `scale_by_adamsn`.

    Source: Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101, algorithm 2.
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, eps_placement=eps_placement, bias_correction=bias_correction, mu_dtype=mu_dtype),
        add_decay(weight_decay, mask, kinds),
        optax.scale_by_learning_rate(learning_rate),
    )


def add_decay(weight_decay: Number, mask: Any, kinds: Any) -> optax.GradientTransformation:
    """Adds weight_decay * p to the direction. A decay of 0 does nothing and needs no parameters."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask_or_default(mask, kinds))
