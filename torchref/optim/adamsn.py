"""AdamSN: Adam with a single second moment for each subset of a matrix."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchref.optim.adam import Moments
from torchref.optim.base import options_of


class AdamSN(Moments):
    """AdamW that keeps one second moment for each subset of a linear map W (out, in), of the *sum* of g^2 over it.

    By rows or by columns::

        per_output:  v_i = gamma v_i + (1 - gamma) sum_j g_ij^2
        per_input:   v_j = gamma v_j + (1 - gamma) sum_i g_ij^2

    Weights of more axes are reshaped to (out, everything else). jaxlm's adam_lr_ratio is the ratio of the rates of two
    groups; decay goes with the smaller rate, which is why the first group's weight_decay is scaled::

        AdamSN([{"params": linear, "lr": lr, "weight_decay": adam_lr_ratio * weight_decay},
                {"params": others, "lr": adam_lr_ratio * lr, "weight_decay": weight_decay, "linear": False}])

    jaxlm decays matrices only: norms and biases go into a third group without decay.

    Args:
      subset: "auto" (the authors' rule) is per_output where out >= in, else per_input; "smaller" is per_input where
        out >= in, else per_output: min(out, in) numbers.
      subset_size: cuts each row or column into subsets of this many entries; None = one subset, 1 is Adam.
      linear: False for embeddings and other parameters that are not linear maps: they keep Adam's moment, as vectors
        always do.

    The other arguments are those of `Adam` and `AdamW`; the authors use "uncorrected" and eps = 1e-6.

    Source: Nguyen & Nguyen 2024, https://arxiv.org/abs/2411.07120.
    """

    choices: ClassVar = Moments.choices | {"subset": ("per_output", "per_input", "auto", "smaller")}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        beta: float = 0.9,
        gamma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        subset: str = "auto",
        subset_size: int | None = None,
        linear: bool = True,
        eps_placement: str = "outside",
        bias_correction: bool = True,
    ) -> None:
        super().__init__(params, options_of(locals()))

    def _second_moment(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if g.ndim < 2 or not group["linear"]:
            return super()._second_moment(g, state, group)
        matrix = g.flatten(1)
        outputs, inputs = matrix.shape
        rules = {"per_output": True, "per_input": False, "auto": outputs >= inputs, "smaller": outputs < inputs}
        per_output = rules[group["subset"]]
        lines = matrix if per_output else matrix.T
        size = group["subset_size"] or lines.shape[1]
        if lines.shape[1] % size:
            raise ValueError(f"subset_size = {size} does not divide {lines.shape[1]}: give a divisor or None")
        sums = torch.stack([(subset**2).sum(dim=1) for subset in lines.split(size, dim=1)], dim=1)
        state["v"] = group["gamma"] * state.get("v", 0) + (1 - group["gamma"]) * sums
        v = state["v"].repeat_interleave(size, dim=1)
        return (v if per_output else v.T).reshape(g.shape)
