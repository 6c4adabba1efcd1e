"""Does a step change a parameter at all, or is it rounded away?"""

import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.config import ExperimentConfig
from jaxlm.types import Number, Params

ENOUGH = 0.9
"""Share of the parameters that a step of the size of the rate should change; norms' scales of 1 need larger rates."""


@jax.jit
def _moved(params: Params, rate: Number) -> list[Int[Array, ""]]:
    """How many numbers of each leaf become others when the rate is added."""
    return [((leaf.astype(jnp.float32) + rate).astype(leaf.dtype) != leaf).sum() for leaf in jax.tree.leaves(params)]


def moved_share(params: Params, rate: float) -> float:
    """The share of the parameters that a step of the size of the rate changes; the others round back to what they were.

    A bfloat16 has 8 binary digits: neighbours of 0.02 are 0.00012 away, those of 1 are 0.0078.
    """
    return sum(map(int, _moved(params, rate))) / sum(leaf.size for leaf in jax.tree.leaves(params))


def advise_float32(config: ExperimentConfig, params: Params) -> None:
    """Warns where parameters of bfloat16 are too coarse for the learning rate."""
    # The steps of these are about as large as the rate; those of Adafactor and others depend on the parameter.
    if config.model.param_dtype != "bfloat16" or config.optim.name not in ("sgd", "adam", "adamw", "adamsn", "lion"):
        return
    rate = config.optim.learning_rate
    share = moved_share(params, rate)
    if share < ENOUGH:
        warnings.warn(
            f"model.param_dtype = bfloat16: a step of the size of learning_rate = {rate:g} changes {share:.0%} of the "
            "parameters, the others round back; keep float32 master weights by --model.param-dtype float32 "
            f"(model.dtype = {config.model.dtype} stays)",
            stacklevel=4,
        )
