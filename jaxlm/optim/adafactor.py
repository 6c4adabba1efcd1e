"""Adafactor: a second moment kept as a row and a column."""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.errors import UserError
from jaxlm.optim.adam import correction
from jaxlm.optim.param_kinds import ParamKind, kinds_like
from jaxlm.optim.transforms import accumulate, at_least_float32, clip_by_rms, decay_parameters, scale_by_parameter_rms
from jaxlm.types import Number

Factors = Literal["kinds", "last", "largest"]
FactoredEps = Literal["variance", "squares", "floor"]


class Factored(NamedTuple):
    """The second moment of a matrix as two factors, in at least float32. Reduced axes are kept with length 1."""

    rows: Float[Array, "..."]
    """The mean of g^2 over the outputs: a number for each input."""
    columns: Float[Array, "..."]
    """The mean over the inputs: a number for each output."""


class FactoredAxes(NamedTuple):
    """The axes of each factor, counted from the end; empty for a leaf that keeps its whole second moment."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()


class ScaleByFactoredRmsState(NamedTuple):
    """The state of Adafactor's scaling: for each leaf either `Factored` or the whole second moment."""

    count: Int[Array, ""]  # type: ignore[assignment]  # optax's name for it, and a method of tuples
    nu: optax.Updates


def scale_by_factored_rms(
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    decay_exponent: Number | None = None,
    bias_correction: bool = True,
    eps_placement: FactoredEps = "variance",
    factors: Factors = "kinds",
    min_dim_size_to_factor: int = 1,
    kinds: Any = None,
) -> optax.GradientTransformation:
    r"""Gradients divided by the root of a second moment, which a matrix keeps as one row and one column.

    With t from 1, i the inputs and j the outputs of a matrix::

        R = b2 R + (1 - b2) mean_j g^2          C = b2 C + (1 - b2) mean_i g^2
        V = R C / mean_i R, over 1 - b2^t with bias_correction
        variance:  g / sqrt(V + eps)            (the course text, without the correction there)
        squares:   eps is added to every g^2, g / sqrt(V)             (the paper, optax, Hugging Face)
        floor:     g / max(sqrt V, eps), mean_i R at least eps        (torch)

    Args:
      decay_exponent: use the paper's decay b2 = 1 - t^-decay_exponent (0.8) instead of a constant. It needs no bias
        correction and gets none.
      factors: which axes are factored: "kinds" the inputs against the outputs of linear maps and the last two axes of
        tables; "last" the last two axes of any leaf (Hugging Face, torch); "largest" the two longest (optax).
      min_dim_size_to_factor: leaves with a factor shorter than this keep the whole V (optax: 128). It decides shapes,
        so `optax.inject_hyperparams` needs it among its static_args.
      kinds: as in `scale_by_adamsn`.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, algorithms 4 and 5.
    """
    for name, value, known in (("eps_placement", eps_placement, FactoredEps), ("factors", factors, Factors)):
        if value not in get_args(known):
            raise UserError(f"{name} = {value!r} is unknown: choose one of {', '.join(get_args(known))}")

    def axes_of(leaf: Array, kind: ParamKind) -> FactoredAxes:
        axes = _factored_axes(leaf.shape, kind, factors)
        shorter = min((math.prod(leaf.shape[axis] for axis in part) for part in axes), default=0)
        return axes if all(axes) and shorter >= min_dim_size_to_factor else FactoredAxes()

    def init(params: optax.Params) -> ScaleByFactoredRmsState:
        def nu(leaf: Array, kind: ParamKind) -> Array | Factored:
            axes, zeros = axes_of(leaf, kind), jnp.zeros_like(leaf, dtype=at_least_float32(leaf))
            if not axes.rows:
                return zeros
            return Factored(zeros.sum(axes.columns, keepdims=True), zeros.sum(axes.rows, keepdims=True))

        return ScaleByFactoredRmsState(jnp.zeros((), jnp.int32), jax.tree.map(nu, params, kinds_like(params, kinds)))

    def update(
        updates: optax.Updates, state: ScaleByFactoredRmsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByFactoredRmsState]:
        count = optax.safe_increment(state.count)

        def nu(grad: Array, old: Array | Factored, kind: ParamKind) -> Array | Factored:
            axes, wide = axes_of(grad, kind), at_least_float32(grad)
            squares = jnp.square(grad.astype(wide)) + (eps if eps_placement == "squares" else 0)
            new_share = 1 - b2 if decay_exponent is None else count.astype(wide) ** -decay_exponent

            def mixed(old: Array, new: Array) -> Array:
                return (1 - new_share) * old + new_share * new

            if isinstance(old, Factored):
                rows, columns = (squares.mean(part, keepdims=True) for part in (axes.columns, axes.rows))
                return Factored(mixed(old.rows, rows), mixed(old.columns, columns))
            return mixed(old, squares)

        def scaled(grad: Array, nu: Array | Factored, kind: ParamKind) -> Array:
            axes, wide = axes_of(grad, kind), at_least_float32(grad)
            if isinstance(nu, Factored):
                mean = nu.rows.mean(axes.rows, keepdims=True)
                mean = jnp.maximum(mean, eps) if eps_placement == "floor" else jnp.where(mean == 0, 1, mean)
                rows, columns = nu.rows / mean, nu.columns
            else:
                rows, columns = nu, jnp.ones((), wide)
            if bias_correction and decay_exponent is None:
                rows /= correction(b2, count, wide)
            if eps_placement == "variance":
                root = jnp.sqrt(rows * columns + eps)
            else:  # root by root: the product of a row's 1e-30 and a column's is 0 in float32
                root = jnp.sqrt(rows) * jnp.sqrt(columns)
                root = root if eps_placement == "squares" else jnp.maximum(root, eps)
            return (grad.astype(wide) / root).astype(grad.dtype)

        known = kinds_like(updates, kinds)
        nus = jax.tree.map(nu, updates, state.nu, known)
        return jax.tree.map(scaled, updates, nus, known), ScaleByFactoredRmsState(count, nus)

    return optax.GradientTransformation(init, update)


def _factored_axes(shape: tuple[int, ...], kind: ParamKind, factors: Factors) -> FactoredAxes:
    if factors == "kinds" and kind.name == "linear":
        return FactoredAxes(kind.inputs, kind.outputs)
    own = [axis - len(shape) for axis in kind.axes(len(shape))]
    if len(own) < 2 or (factors == "kinds" and kind.name != "embedding"):
        return FactoredAxes()
    if factors == "largest":
        own = sorted(own, key=lambda axis: shape[axis])
    return FactoredAxes((own[-2],), (own[-1],))


def relative_step(max_rate: float = 1e-2, warmup_init: bool = False) -> optax.Schedule:
    """The paper's rate min(max_rate, 1 / sqrt t), t from 1; with warmup_init min(1e-6 t, 1 / sqrt t).

    Source: Shazeer & Stern 2018, section 8; warmup_init as in Hugging Face's Adafactor.
    """

    def rate(count: Number) -> Array:
        t = jnp.asarray(count, float) + 1
        return jnp.minimum(1e-6 * t if warmup_init else max_rate, t**-0.5)

    return rate


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Any = None,
    *,
    momentum: Number | None = None,
    clipping_threshold: Number | None = None,
    multiply_by_parameter_scale: bool = False,
    min_parameter_scale: Number = 1e-3,
    weight_decay_rate: optax.ScalarOrSchedule | None = None,
    decay_exponent: Number | None = None,
    bias_correction: bool = True,
    eps_placement: FactoredEps = "variance",
    factors: Factors = "kinds",
    min_dim_size_to_factor: int = 1,
    kinds: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Adafactor: p -= rate * `scale_by_factored_rms`, by default without momentum; with options the paper's.

    The order is: scale, clip, multiply by the rate and by the parameter's scale, average, decay. These arguments give
    what other libraries compute for a rate lr (pass their weight decay as weight_decay; it is 0 by default):

    * `optax.adafactor(lr)`: eps=1e-30, eps_placement="squares", decay_exponent=0.8, factors="largest",
      min_dim_size_to_factor=128, clipping_threshold=1, multiply_by_parameter_scale=True, weight_decay_rate=1;
    * `torch.optim.Adafactor(lr=lr)`: learning_rate=relative_step(lr), eps=finfo(dtype).eps, eps_placement="floor",
      decay_exponent=0.8, factors="last", clipping_threshold=1, multiply_by_parameter_scale=True, weight_decay_rate=lr;
    * `transformers.Adafactor()`: learning_rate=relative_step(), eps=1e-30, eps_placement="squares",
      decay_exponent=0.8, factors="last", clipping_threshold=1, multiply_by_parameter_scale=True; its
      scale_parameter=False, relative_step=False are multiply_by_parameter_scale=False and a learning_rate.

    All three decay every leaf: mask=True.

    Args:
      learning_rate: the rate, or a schedule from the number of steps taken.
      weight_decay: decoupled decay. It is multiplied by weight_decay_rate; if that is None, by the rate (and by the
        parameter's scale, if steps are).
      mask: the leaves that decay, as in `adamw`.
      momentum: decay rate of an average of the steps; None = no average.
      clipping_threshold: largest RMS of the scaled gradient of a parameter; None = no clipping.
      multiply_by_parameter_scale: steps relative to the RMS of each parameter, at least min_parameter_scale.
      mu_dtype: the type of the average; None = at least float32.

    The other arguments are those of `scale_by_factored_rms`.
    """
    parts = [
        scale_by_factored_rms(
            b2,
            eps,
            decay_exponent=decay_exponent,
            bias_correction=bias_correction,
            eps_placement=eps_placement,
            factors=factors,
            min_dim_size_to_factor=min_dim_size_to_factor,
            kinds=kinds,
        )
    ]
    if clipping_threshold is not None:
        parts.append(clip_by_rms(clipping_threshold, kinds))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    if multiply_by_parameter_scale:
        parts.append(scale_by_parameter_rms(min_parameter_scale, kinds))
    if momentum is not None:
        parts.append(accumulate(momentum, 1 - momentum, mu_dtype=mu_dtype))
    if weight_decay_rate is None:
        minimum_scale = min_parameter_scale if multiply_by_parameter_scale else None
        parts.append(decay_parameters(weight_decay, learning_rate, mask, minimum_scale, kinds))
    else:
        parts.append(decay_parameters(weight_decay, weight_decay_rate, mask, kinds=kinds))
    return optax.chain(*parts)
