"""Adafactor: stores the second moment as the means of its rows and columns."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchref.optim.base import Optimizer, options_of, rms


class Adafactor(Optimizer):
    """Adafactor: keeps only the means over rows and over columns of a matrix's (out, in) second moment.

    The update is::

        R = gamma R + (1 - gamma) mean_j g_ij^2         C = gamma C + (1 - gamma) mean_i g_ij^2
        V = R C / mean_i R, over 1 - gamma^t with bias_correction
        variance:  s = g / sqrt(V + eps)                the course text, there without the correction
        squares:   eps is added to every g^2, s = g / sqrt(V)           the paper, optax, Hugging Face
        floor:     s = g / max(sqrt V, eps), mean_i R at least eps      torch
        s = s / max(1, RMS(s) / clipping_threshold)
        a = lr max(RMS(p), min_parameter_scale)         lr without multiply_by_parameter_scale
        m = momentum m + (1 - momentum) a s             a s without momentum
        p -= m + weight_decay_lr weight_decay p         a instead of weight_decay_lr if that is None

    Weights of more axes are factored over the last two; vectors, and matrices with a side below
    min_dim_size_to_factor, keep V = gamma V + (1 - gamma) g^2. The paper's relative step is a schedule of lr.

    Args:
      decay_exponent: gamma = 1 - t^-decay_exponent (the paper: 0.8), which needs no bias correction and has none.
      momentum, clipping_threshold: None = none.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235.
    """

    choices: ClassVar = {"eps_placement": ("variance", "squares", "floor")}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        gamma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        eps_placement: str = "variance",
        bias_correction: bool = True,
        decay_exponent: float | None = None,
        momentum: float | None = None,
        clipping_threshold: float | None = None,
        multiply_by_parameter_scale: bool = False,
        min_parameter_scale: float = 1e-3,
        weight_decay_lr: float | None = None,
        min_dim_size_to_factor: int = 1,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def _second_moment(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        t, gamma, exponent, place = state["step"], group["gamma"], group["decay_exponent"], group["eps_placement"]
        if exponent is not None:
            gamma = 1 - t**-exponent
        squares = g**2 + group["eps"] if place == "squares" else g**2
        if g.ndim > 1 and min(g.shape[-2:]) >= group["min_dim_size_to_factor"]:
            rows = state["rows"] = gamma * state.get("rows", 0) + (1 - gamma) * squares.mean(dim=-1, keepdim=True)
            mean = rows.mean(dim=-2, keepdim=True)
            mean = mean.clamp_min(group["eps"]) if place == "floor" else mean.where(mean > 0, 1)
            columns = state["columns"] = gamma * state.get("columns", 0) + (1 - gamma) * squares.mean(-2, True)
            v = rows / mean * columns
        else:
            v = state["v"] = gamma * state.get("v", 0) + (1 - gamma) * squares
        return v / (1 - gamma**t) if group["bias_correction"] and exponent is None else v

    def _change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        v = self._second_moment(g, state, group)
        if group["eps_placement"] == "variance":
            s = g / (v + group["eps"]).sqrt()
        else:
            s = g / (v.sqrt() if group["eps_placement"] == "squares" else v.sqrt().clamp_min(group["eps"]))
        if group["clipping_threshold"] is not None:
            s = s / max(1, rms(s) / group["clipping_threshold"])
        scale = max(rms(p), group["min_parameter_scale"]) if group["multiply_by_parameter_scale"] else 1
        change = group["lr"] * scale * s
        if group["momentum"] is not None:
            change = state["m"] = group["momentum"] * state.get("m", 0) + (1 - group["momentum"]) * change
        decay_lr = group["lr"] * scale if group["weight_decay_lr"] is None else group["weight_decay_lr"]
        return change + decay_lr * group["weight_decay"] * p
