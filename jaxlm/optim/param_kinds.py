"""The kind of each parameter. Optimizers choose subsets and factors by it, and weight decay its leaves."""

import dataclasses
import functools
from typing import Any, Literal

import jax

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.types import Params

KeyPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class ParamKind:
    """The kind of a parameter and the meaning of its axes; a leaf of a tree of kinds.

    Axes are counted from the end, so they stay right when layers are stacked. An axis of a linear map that is neither
    input nor output counts maps of the same shape: layers or attention heads.
    """

    name: Literal["linear", "embedding", "norm", "bias"]
    inputs: tuple[int, ...] = ()
    """Input axes of a linear map: those that its product sums over."""
    outputs: tuple[int, ...] = ()
    """Output axes of a linear map."""
    stacked: bool = False
    """Whether the leading axis counts layers. Each layer then counts as a parameter of its own."""

    def __post_init__(self) -> None:
        axes = (*self.inputs, *self.outputs)
        if len(set(axes)) < len(axes) or (self.name == "linear" and not self.inputs):
            raise UserError(f"{self} is not a valid kind: give a linear map its input axes, and name no axis twice")

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: it does to linear maps and tables."""
        return self.name in ("linear", "embedding")

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of a single parameter: all but the axis of stacked layers."""
        return tuple(range(int(self.stacked), ndim))


SCORE_AXES = {"score_weight": ((-1,), (-2,)), "score_out": ((-1,), ())}
"""(inputs, outputs) of those weights of attention scores that are not laid out like a kernel."""


def kind_of(path: KeyPath, leaf: Any) -> ParamKind:
    """The kind of a leaf by its name and its number of axes.

    A `kernel` is linear: its last axis is the output, all axes before it are inputs (more than one for a convolution or
    DenseGeneral). The weights of attention scores are linear too, one map for each head. `scale` is a norm, `bias` is a
    bias. Any other leaf with two or more axes is an embedding, and what remains is a bias. Under layers/block_j, where
    `scan_layers` stacks parameters, the first axis counts layers. If another module stacks its layers, give kinds of
    your own; otherwise a whole stack counts as one kernel.
    """
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    name = names[-1] if names else ""
    stacked = len(names) > 1 and names[0] == "layers" and names[1].startswith("block_")
    ndim = len(leaf.shape) - stacked
    if name.startswith("score_") and ndim >= 2:
        halves = ((-2,), (-1,)) if ndim == 3 else ((-1,), ())  # additive [N, H, A], concat [N, H]
        inputs, outputs = SCORE_AXES.get(name, halves)
        return ParamKind("linear", inputs, outputs, stacked)
    if ndim >= 2 and name not in ("bias", "scale"):
        if name == "kernel":
            return ParamKind("linear", tuple(range(-ndim, -1)), (-1,), stacked)
        return ParamKind("embedding", stacked=stacked)
    return ParamKind("norm" if name == "scale" else "bias", stacked=stacked)


def param_kinds(cfg: ModelConfig) -> Params:
    """A tree like the parameters of a model, with the kind of each. Nothing is computed."""
    model = build_model(cfg)
    return kinds_like(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def kinds_like(tree: Any, kinds: Any = None) -> Any:
    """A tree of kinds with the structure of `tree`: those of `kinds` at the same paths; None = by name (`kind_of`).

    `tree` may lack leaves that `kinds` has, as happens inside `optax.masked`.

    Raises:
      UserError: `kinds` has no ParamKind for a leaf, or one whose axes the leaf does not have.
    """
    if kinds is None:
        return jax.tree_util.tree_map_with_path(kind_of, tree)
    known = dict(jax.tree_util.tree_leaves_with_path(kinds))

    def look_up(path: KeyPath, leaf: Any) -> ParamKind:
        kind = known.get(path)
        if not isinstance(kind, ParamKind):
            raise UserError(f"kinds has {kind!r} for {jax.tree_util.keystr(path)}: give a ParamKind")
        if any(not kind.stacked - len(leaf.shape) <= axis < 0 for axis in (*kind.inputs, *kind.outputs)):
            raise UserError(
                f"{kind} does not fit {jax.tree_util.keystr(path)} of shape {leaf.shape}: count axes from the end"
            )
        return kind

    return jax.tree_util.tree_map_with_path(look_up, tree)


def decay_mask(params: Params, kinds: Any = None) -> Params:
    """True for leaves that weight decay shrinks: matrices (kernels, tables, weights of scores), not biases or scales.

    Stacked layers decay exactly as separate ones do.
    """
    return jax.tree.map(lambda kind: kind.decays, kinds_like(params, kinds))


def mask_or_default(mask: Any, kinds: Any) -> Any:
    """The mask that an optimizer was given; None = `decay_mask` with these kinds."""
    return functools.partial(decay_mask, kinds=kinds) if mask is None else mask
