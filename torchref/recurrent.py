"""Recurrent layers, computed one token after another."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxlm.config import ModelConfig
from torchref.layers import Linear, dtype_of

GATES = {"elman": ("",), "lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}
CELL_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "slide": lambda a: torch.minimum(torch.ones_like(a), torch.maximum(torch.zeros_like(a), a)),
}


class RecurrentLayer(nn.Module):
    """A cell applied along the sequence, then dropout. For each gate `i` maps the input and `h` the state.

    elman:  h = activation(i x + h h)
    lstm:   c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c), each gate being the sum of its two maps
    gru:    n = tanh(in x + sigmoid(r) hn h), h = (1 - sigmoid(z)) n + sigmoid(z) h

    A gate has one bias. torch's modules have two, but only their sum matters. Only the GRU's n has both here.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        with_bias = {"elman": "i", "lstm": "h", "gru": "i"}[cfg.cell]
        self.cell = nn.ModuleDict()
        for side in ("i", "h"):
            for gate in GATES[cfg.cell]:
                bias = side == with_bias or (cfg.cell == "gru" and gate == "n")
                self.cell[side + gate] = Linear(cfg, cfg.embed_dim, cfg.embed_dim, bias)
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forgets the state."""
        self.state: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor, positions: Tensor, use_kv_cache: bool = False) -> Tensor:
        """Maps x [B, T, D] to the hidden state after each token, [B, T, D]."""
        state = self.state if use_kv_cache else None
        if state is None:
            zero = torch.zeros(len(x), self.cfg.embed_dim, dtype=dtype_of(self.cfg.dtype), device=x.device)
            state = (zero, zero) if self.cfg.cell == "lstm" else (zero,)
        hidden = []
        for token in x.unbind(dim=1):
            state = self._step(token, state)
            hidden.append(state[-1])
        if use_kv_cache:
            self.state = state
        return functional.dropout(torch.stack(hidden, dim=1), self.cfg.dropout, self.training)

    def _step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = state[-1]
        of_x = {gate: self.cell["i" + gate](x) for gate in GATES[self.cfg.cell]}
        of_h = {gate: self.cell["h" + gate](h) for gate in GATES[self.cfg.cell]}
        if self.cfg.cell == "elman":
            return (CELL_ACTIVATIONS[self.cfg.cell_activation](of_x[""] + of_h[""]),)
        if self.cfg.cell == "lstm":
            total = {gate: of_x[gate] + of_h[gate] for gate in of_x}
            c = torch.sigmoid(total["f"]) * state[0] + torch.sigmoid(total["i"]) * torch.tanh(total["g"])
            return c, torch.sigmoid(total["o"]) * torch.tanh(c)
        r, z = torch.sigmoid(of_x["r"] + of_h["r"]), torch.sigmoid(of_x["z"] + of_h["z"])
        return ((1 - z) * torch.tanh(of_x["n"] + r * of_h["n"]) + z * h,)
