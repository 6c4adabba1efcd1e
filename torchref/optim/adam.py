"""Adam and AdamW."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchref.optim.base import Optimizer, options_of


class Moments(Optimizer):
    """What the three Adams share: their step, where c_u and c_v are the bias corrections, and decoupled decay."""

    choices: ClassVar = {"eps_placement": ("outside", "uncorrected", "inside")}

    def _second_moment(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["v"] = group["gamma"] * state.get("v", 0) + (1 - group["gamma"]) * g**2
        return state["v"]

    def _change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        t, beta, gamma, eps = state["step"], group["beta"], group["gamma"], group["eps"]
        u = state["u"] = beta * state.get("u", 0) + (1 - beta) * g
        v = self._second_moment(g, state, group)
        c_u, c_v = (1 - beta**t, 1 - gamma**t) if group["bias_correction"] else (1.0, 1.0)
        if group["eps_placement"] == "outside":
            direction = (u / c_u) / ((v / c_v).sqrt() + eps)
        elif group["eps_placement"] == "uncorrected":
            direction = (c_v**0.5 / c_u) * u / (v.sqrt() + eps)
        else:
            direction = (u / c_u) / (v / c_v + eps).sqrt()
        return group["lr"] * (direction + group["weight_decay"] * p)


class Adam(Moments):
    """Adam.

    The update is::

        u = beta u + (1 - beta) g               u_hat = u / (1 - beta^t)
        v = gamma v + (1 - gamma) g^2           v_hat = v / (1 - gamma^t)
        outside:      p -= lr u_hat / (sqrt(v_hat) + eps)
        uncorrected:  p -= lr sqrt(1 - gamma^t) / (1 - beta^t) u / (sqrt(v) + eps)
        inside:       p -= lr u_hat / sqrt(v_hat + eps)

    Args:
      beta: decay rate of the first moment, torch's betas[0].
      gamma: decay rate of the second moment, torch's betas[1].
      eps_placement: which of the three; "outside" is torch's.
      bias_correction: False uses u for u_hat and v for v_hat.

    Source: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980; uncorrected: the end of its section 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        beta: float = 0.9,
        gamma: float = 0.999,
        eps: float = 1e-8,
        eps_placement: str = "outside",
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, options_of(locals()) | {"weight_decay": 0.0})


class AdamW(Moments):
    """Adam with decoupled decay: `Adam`'s step and p -= lr weight_decay p, both from the same p.

    Every parameter of a group decays: for decay on matrices only, put the others in a group with weight_decay=0. The
    other arguments are those of `Adam`.

    Source: Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        beta: float = 0.9,
        gamma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        eps_placement: str = "outside",
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, options_of(locals()))
