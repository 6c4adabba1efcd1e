"""Transformations between an optimizer's direction and the update: clipping, scaling, momentum, decay, skipping."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.optim.param_kinds import ParamKind, kinds_like, mask_or_default
from jaxlm.types import Number


def at_least_float32(x: Array) -> jnp.dtype:
    """The type in which an optimizer computes: float32, or wider if the leaf is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms(x: Array, kind: ParamKind) -> Float[Array, "..."]:
    """Root mean square of each parameter in a leaf, in at least float32; the reduced axes are kept with length 1."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(at_least_float32(x))), kind.axes(x.ndim), keepdims=True))


def clip_by_rms(threshold: Number, kinds: Any = None) -> optax.GradientTransformation:
    """Scales each parameter's update down so that its RMS is at most `threshold`."""

    def clipped(update: Array, kind: ParamKind) -> Array:
        return (update / jnp.maximum(1, rms(update, kind) / threshold)).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clipped, updates, kinds_like(updates, kinds)))


def scale_by_parameter_rms(minimum: Number, kinds: Any = None) -> optax.GradientTransformation:
    """Multiplies each parameter's update by the RMS of the parameter, but at least by `minimum`."""

    def scaled(update: Array, param: Array, kind: ParamKind) -> Array:
        return (update * jnp.maximum(rms(param, kind), minimum)).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, params, kinds_like(updates, kinds)))


class MomentumState(NamedTuple):
    """The weighted sum of the updates so far."""

    mu: optax.Updates


def accumulate(
    decay: Number, share: Number = 1, *, nesterov: bool = False, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Replaces updates by m = decay m + share update; with nesterov by decay m + share update again, with the new m.

    m is kept in mu_dtype, by default in at least float32. (`optax.trace` and `optax.ema` keep the parameters' type.)
    """

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(
            jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=mu_dtype or at_least_float32(leaf)), params)
        )

    def update(
        updates: optax.Updates, state: MomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentumState]:
        def mixed(update: Array, mu: Array) -> Array:
            wide = at_least_float32(update)
            return decay * mu.astype(wide) + share * update.astype(wide)

        mus = jax.tree.map(mixed, updates, state.mu)
        out = jax.tree.map(mixed, updates, mus) if nesterov else mus
        out = jax.tree.map(lambda out, update: out.astype(update.dtype), out, updates)
        return out, MomentumState(jax.tree.map(lambda mu, old: mu.astype(old.dtype), mus, state.mu))

    return optax.GradientTransformation(init, update)


class DecayState(NamedTuple):
    """The number of steps taken, from which a schedule computes the rate."""

    count: Int[Array, ""]  # type: ignore[assignment]  # optax's name for it, and a method of tuples


def decay_parameters(
    weight_decay: Number,
    rate: optax.ScalarOrSchedule,
    mask: Any = None,
    minimum_scale: Number | None = None,
    kinds: Any = None,
) -> optax.GradientTransformation:
    """Decoupled weight decay after any optimizer: subtracts rate * weight_decay * p from the updates.

    Args:
      rate: a number or a schedule from the number of steps taken.
      mask: the leaves that decay, a tree of bools or a function of the parameters; None = `decay_mask`.
      minimum_scale: if given, the decay is also multiplied by the RMS of p, at least this (`scale_by_parameter_rms`).
    """
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()

    def init(params: optax.Params) -> DecayState:
        return DecayState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: DecayState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, DecayState]:
        if params is None:
            raise ValueError("weight decay needs the parameters: give params to update")
        now = rate(state.count) if callable(rate) else rate

        def shrunk(update: Array, param: Array, kind: ParamKind) -> Array:
            scale = 1 if minimum_scale is None else jnp.maximum(rms(param, kind), minimum_scale)
            return (update - now * weight_decay * scale * param).astype(update.dtype)

        out = jax.tree.map(shrunk, updates, params, kinds_like(updates, kinds))
        return out, DecayState(optax.safe_increment(state.count))

    return optax.masked(optax.GradientTransformation(init, update), mask_or_default(mask, kinds))


class SkipState(NamedTuple):
    """The number of steps skipped so far, and the state of the wrapped optimizer, which did not see them."""

    skipped: Int[Array, ""]
    guarded: optax.ApplyIfFiniteState


def skip_nonfinite(tx: optax.GradientTransformation, most: int) -> optax.GradientTransformation:
    """`optax.apply_if_finite` with a counter: a gradient that is not finite gives an update of zero.

    `tx` does not see such a gradient, unless more than `most` come in a row: then the next is applied, not skipped.
    """
    guarded = optax.apply_if_finite(tx, most)

    def init(params: optax.Params) -> SkipState:
        return SkipState(jnp.zeros((), jnp.int32), guarded.init(params))

    def update(
        updates: optax.Updates, state: SkipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SkipState]:
        updates, after = guarded.update(updates, state.guarded, params)
        skips = ~after.last_finite & (after.notfinite_count <= most)
        return updates, SkipState(state.skipped + skips, after)

    return optax.GradientTransformation(init, update)


def skipped_steps(state: optax.OptState) -> Int[Array, ""]:
    """How many steps were skipped, if `skip_nonfinite` is the outermost transformation; otherwise 0."""
    return state.skipped if isinstance(state, SkipState) else jnp.zeros((), jnp.int32)
