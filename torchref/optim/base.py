"""What all optimizers share: checked groups, the loop over parameters, and state that stays in its wide type."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

NUMBERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr weight_decay weight_decay_lr eps min_parameter_scale": ("at least 0", lambda x: x >= 0),
    "clipping_threshold decay_exponent": ("above 0", lambda x: x > 0),
    "momentum beta gamma": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "subset_size min_dim_size_to_factor": ("at least 1", lambda x: x >= 1),
}
"""The range of each numeric option, in words and as a test."""

MAY_BE_NONE = {"weight_decay_lr", "clipping_threshold", "decay_exponent", "momentum", "subset_size"}


class Optimizer(torch.optim.Optimizer):
    """The base class: checked groups, and a step that subtracts `_change` from each parameter."""

    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The allowed words of options that are words."""

    def _change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What this step subtracts from a parameter; `p` and `g` are at least float32, state["step"] is t."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure`, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    wide = at_least_float32(p)
                    p.copy_(wide - self._change(wide, at_least_float32(p.grad), state, group))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters after checking its options."""
        options = self.defaults | param_group
        for names, (what, fits) in NUMBERS.items():
            for name in options.keys() & names.split():
                value = options[name]
                absent = value is None and name in MAY_BE_NONE
                if not absent and not (isinstance(value, int | float | Tensor) and fits(value)):
                    raise ValueError(f"{name} = {value!r} is invalid: give a number {what}")
        for name, words in self.choices.items():
            if options[name] not in words:
                raise ValueError(f"{name} = {options[name]!r} is unknown: choose one of {', '.join(words)}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state in the types it was saved in; torch would narrow it to the type of the parameters."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    self.state[p][name] = value.to(p.device) if torch.is_tensor(value) else value


def options_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Turns a constructor's arguments into the default options of groups."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in the type in which optimizers compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clip_by_global_norm(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Scales the gradients by max_norm / norm if their global norm exceeds max_norm.

    `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm that it divides by.
    """
    norm = math.sqrt(sum(float(at_least_float32(g).square().sum()) for g in grads))
    return [g * (max_norm / norm) if norm > max_norm else g for g in grads]


def rms(x: Tensor) -> Tensor:
    """Root mean square, a scalar."""
    return x.square().mean().sqrt()
