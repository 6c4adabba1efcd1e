"""From an OptimConfig to the chain that turns gradients into updates."""

import jax
import optax

from jaxlm.config import OptimConfig
from jaxlm.errors import UserError
from jaxlm.optim.schedules import build_schedule
from jaxlm.types import Params


def decay_mask(params: Params) -> Params:
    """True for the leaves that weight decay shrinks: matrices (kernels and tables), not biases or norm scales."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


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
