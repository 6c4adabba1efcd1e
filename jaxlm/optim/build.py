"""From an OptimConfig to the chain that turns gradients into updates."""

import jax
import optax
from jaxtyping import Array

from jaxlm.config import OptimConfig
from jaxlm.errors import UserError
from jaxlm.optim.schedules import build_schedule
from jaxlm.types import Params


def decay_mask(params: Params) -> Params:
    """True for the leaves weight decay shrinks: matrices (kernels, tables, weights of scores), not biases and scales.

    Layers stacked by scan_layers decay as they would one by one.
    """

    def is_matrix(path: tuple, leaf: Array) -> bool:
        return leaf.ndim - (path[0] == jax.tree_util.DictKey("layers")) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def build_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer with its schedule over `steps` steps and decoupled decay.

    Raises:
      UserError: an optimizer that is not there yet, or a schedule that does not fit `steps`.
    """
    if cfg.name != "adamw":
        raise UserError(f"optim.name = {cfg.name!r} is not there yet: use 'adamw'")
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    return optax.chain(
        clip,
        optax.adamw(
            build_schedule(cfg, steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decay_mask
        ),
    )
