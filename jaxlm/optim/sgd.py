"""Stochastic gradient descent, with or without momentum."""

from typing import Any

import optax
from jax.typing import DTypeLike

from jaxlm.errors import UserError
from jaxlm.optim.transforms import accumulate, decay_parameters
from jaxlm.types import Number


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Number | None = None,
    weight_decay: Number = 0.0,
    mask: Any = None,
    *,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """SGD: p -= rate * g. With momentum, m = momentum m + g replaces g. Equal to `torch.optim.SGD`.

    Args:
      learning_rate: the rate, or a schedule from the number of steps taken.
      momentum: None = none.
      weight_decay: decoupled decay, p -= rate * weight_decay * p. torch adds weight_decay * p to the gradient, which
        differs from this with momentum.
      mask: the leaves that decay, as in `adamw`.
      nesterov: use g + momentum m instead of m.
      mu_dtype: the type of m; None = at least float32 (`optax.sgd` keeps the type of the parameters).
    """
    if nesterov and momentum is None:
        raise UserError("nesterov = True has no effect without momentum: give momentum, such as 0.9, or leave it out")
    return optax.chain(
        optax.identity() if momentum is None else accumulate(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
        decay_parameters(weight_decay, learning_rate, mask),
    )
