"""AdamSN: Adam whose second moment is one number for each subset of a matrix."""

import math
from typing import Any, get_args

import jax
import optax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlm.config.optim import SubsetRule
from jaxlm.errors import UserError
from jaxlm.optim.adam import EpsPlacement, Subsets, add_decay, scale_by_moments
from jaxlm.optim.param_kinds import KeyPath, ParamKind, kinds_like
from jaxlm.types import Number


def scale_by_adamsn(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    subset: SubsetRule = "auto",
    subset_size: int | None = None,
    kinds: Any = None,
    eps_placement: EpsPlacement = "outside",
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """`scale_by_adam` with one second moment for each subset of a linear map: that of the *sum* of g^2 over the subset.

    Because of the sum, steps are sqrt(subset size) times smaller than Adam's, so the rate must be that much larger.
    Parameters that are not linear keep Adam's second moment.

    Args:
      subset: "per_output" sums over the inputs of each output, "per_input" over the outputs of each input. "auto", the
        authors' rule, is per_output where there are at least as many outputs as inputs, else per_input. "smaller" is
        the other way round: one number for each entry of the smaller dimension (each input of a square map), so
        min(inputs, outputs) numbers. On torch's weight (out, in): `reduce_dim = 0 if shape[0] >= shape[1] else 1`.
      subset_size: how many of them a subset holds; None = all, 1 = Adam. They must form one axis, and the size must
        divide it. It decides shapes, so `optax.inject_hyperparams` needs it among its static_args.
      kinds: which leaves are linear and along which axes, as `param_kinds(cfg)` says; None = by name (`kind_of`): a
        `kernel`'s last axis is its output.
      eps_placement: as in `scale_by_adam`; "uncorrected" with eps 1e-6 is the authors' code, "inside" the form
        sqrt(v + eps).

    Source: Nguyen & Nguyen 2024, "Subset-Norm and Subspace-Momentum", https://arxiv.org/abs/2411.07120.
    """
    if subset not in get_args(SubsetRule):
        raise UserError(f"subset = {subset!r} is unknown: choose one of {', '.join(get_args(SubsetRule))}")
    if subset_size is not None and subset_size < 1:
        raise UserError(f"subset_size = {subset_size} is not a size: give at least 1 (Adam), or None for whole rows")

    def subsets(path: KeyPath, leaf: Any, kind: ParamKind) -> Subsets:
        axes = _summed_axes(kind, leaf.shape, subset)
        if subset_size is None or not axes:
            return Subsets(leaf.shape, axes)
        axis = len(leaf.shape) + axes[-1]
        if len(axes) > 1 or leaf.shape[axis] % subset_size:
            name, sizes = jax.tree_util.keystr(path, simple=True, separator="/"), [leaf.shape[a] for a in axes]
            raise UserError(
                f"subset_size = {subset_size} does not divide the {sizes} of {name}: give a divisor or None"
            )
        shape = (*leaf.shape[:axis], leaf.shape[axis] // subset_size, subset_size, *leaf.shape[axis + 1 :])
        return Subsets(shape, (axis + 1,))

    def subsets_of(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(subsets, tree, kinds_like(tree, kinds))

    return scale_by_moments(subsets_of, b1, b2, eps, eps_placement, bias_correction, mu_dtype)


def _summed_axes(kind: ParamKind, shape: tuple[int, ...], subset: SubsetRule) -> tuple[int, ...]:
    if kind.name != "linear":
        return ()
    inputs, outputs = (math.prod(shape[axis] for axis in axes) for axes in (kind.inputs, kind.outputs))
    shorter, longer = (kind.inputs, kind.outputs) if outputs >= inputs else (kind.outputs, kind.inputs)
    return {"per_output": kind.inputs, "per_input": kind.outputs, "auto": shorter, "smaller": longer}[subset]


def adamsn(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Any = None,
    *,
    subset: SubsetRule = "auto",
    subset_size: int | None = None,
    adam_lr_ratio: Number = 0.1,
    kinds: Any = None,
    eps_placement: EpsPlacement = "outside",
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """AdamSN: p -= rate * `scale_by_adamsn` on linear maps, Adam at rate * adam_lr_ratio on all else.

    Args:
      learning_rate: the rate of linear maps, or a schedule from the number of steps taken.
      weight_decay: decoupled decay, p -= rate * adam_lr_ratio * weight_decay * p. It is multiplied by Adam's rate on
        linear maps too, so the number means the same as in `adamw`.
      mask: the leaves that decay, as in `adamw`.
      adam_lr_ratio: Adam's rate as a share of the rate. Steps over subsets need a rate about ten times Adam's.

    The other arguments are those of `scale_by_adamsn`.
    """
    options: dict[str, Any] = {
        "subset": subset,
        "subset_size": subset_size,
        "kinds": kinds,
        "eps_placement": eps_placement,
        "bias_correction": bias_correction,
        "mu_dtype": mu_dtype,
    }
    return optax.chain(
        scale_by_adamsn(b1, b2, eps, **options),
        _scale_others(adam_lr_ratio, kinds),
        add_decay(weight_decay * adam_lr_ratio, mask, kinds),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_others(ratio: Number, kinds: Any) -> optax.GradientTransformation:
    """Multiplies the updates of parameters that are not linear by `ratio`."""

    def scaled(update: Array, kind: ParamKind) -> Array:
        return update if kind.name == "linear" else (update * ratio).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, kinds_like(updates, kinds)))
