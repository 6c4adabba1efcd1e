"""Stochastic gradient descent, with or without momentum."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchref.optim.base import Optimizer, options_of


class SGD(Optimizer):
    """Stochastic gradient descent with momentum and decoupled weight decay.

    The update is::

        m = momentum m + g
        p -= lr (m + weight_decay p)                        nesterov: g + momentum m in place of m

    `torch.optim.SGD` adds weight_decay * p to g instead, which is different with momentum.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        if nesterov and not momentum:
            raise ValueError(f"nesterov = True with momentum = {momentum} does nothing: give a momentum above 0")
        super().__init__(params, options_of(locals()))

    def _change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        direction, momentum = g, group["momentum"]
        if momentum:
            m = state["m"] = momentum * state.get("m", 0) + g
            direction = g + momentum * m if group["nesterov"] else m
        return group["lr"] * (direction + group["weight_decay"] * p)
