"""What happens to a step between its direction and the parameters: clipping, scaling, averaging, decay, skipping."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.optim.param_kinds import ParamKind, kinds_like, mask_or_default
from jaxlm.types import Number


def at_least_float32(x: Array) -> jnp.dtype:
    """The type in which what an optimizer keeps of a leaf is computed."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms(x: Array, kind: ParamKind) -> Float[Array, "..."]:
    """Root mean square of each parameter of a leaf, its axes kept with length 1, in at least float32."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(at_least_float32(x))), kind.axes(x.ndim), keepdims=True))


def clip_by_rms(threshold: Number, kinds: Any = None) -> optax.GradientTransformation:
    """Shrinks the update of each parameter whose RMS is above `threshold` to that RMS."""

    def clipped(update: Array, kind: ParamKind) -> Array:
        return (update / jnp.maximum(1, rms(update, kind) / threshold)).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clipped, updates, kinds_like(updates, kinds)))


def scale_by_parameter_rms(minimum: Number, kinds: Any = None) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by the parameter's RMS, or by `minimum` if that is more."""

    def scaled(update: Array, param: Array, kind: ParamKind) -> Array:
        return (update * jnp.maximum(rms(param, kind), minimum)).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, params, kinds_like(updates, kinds)))


class MomentumState(NamedTuple):
    """The weighted sum of the updates so far."""

    mu: optax.Updates


def accumulate(
    decay: Number, share: Number = 1, *, nesterov: bool = False, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Replaces updates by m = decay m + share update; with nesterov by decay m + share update, m the new one.

    m is kept in mu_dtype, by default in at least float32, where `optax.trace` and `optax.ema` have the type of the
    parameters.
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
    """The steps taken, by which the rate is scheduled."""

    count: Int[Array, ""]  # type: ignore[assignment]  # optax's name for it, and a method of tuples


def decay_parameters(
    weight_decay: Number,
    rate: optax.ScalarOrSchedule,
    mask: Any = None,
    minimum_scale: Number | None = None,
    kinds: Any = None,
) -> optax.GradientTransformation:
    """Decoupled weight decay after any optimizer: steps, which are about to be added, lose rate * weight_decay * p.

    Args:
      rate: a number or a schedule from the number of steps taken.
      mask: the leaves that decay, a tree of bools or a function of the parameters; None = `decay_mask`.
      minimum_scale: if given, p also counts by its RMS, at least this, as in `scale_by_parameter_rms`.
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
    """The steps skipped so far, and the state of the optimizer that was spared them."""

    skipped: Int[Array, ""]
    guarded: optax.ApplyIfFiniteState


def skip_nonfinite(tx: optax.GradientTransformation, most: int) -> optax.GradientTransformation:
    """`optax.apply_if_finite` that counts what it skipped: a step of a gradient that is not finite is zero.

    `tx` does not see it, unless more than `most` come in a row: that one is applied, and not counted as skipped.
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
    """How many steps an optimizer with `skip_nonfinite` outermost has skipped; of any other 0."""
    return state.skipped if isinstance(state, SkipState) else jnp.zeros((), jnp.int32)
