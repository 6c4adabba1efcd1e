"""The parts that treat each token on its own: linear maps, norms, activations, positions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxlm.config import ModelConfig


def dtype_of(name: str) -> torch.dtype:
    """The torch type that a config names."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def widened(x: Tensor) -> Tensor:
    """The same numbers in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """nn.Linear whose input, weight and bias are first rounded to the config's `dtype`.

    `to_residual` marks projections into the residual stream, which init "gpt2" scales down; `wide` keeps the result in
    at least float32.
    """

    def __init__(
        self, cfg: ModelConfig, inputs: int, outputs: int, bias: bool, to_residual: bool = False, wide: bool = False
    ) -> None:
        super().__init__(inputs, outputs, bias, dtype=dtype_of(cfg.param_dtype))
        self.dtype, self.wide = dtype_of(cfg.dtype), wide
        if cfg.init != "torch":
            scaled = cfg.init == "gpt2" and to_residual
            nn.init.normal_(self.weight, 0, 0.02 / math.sqrt(2 * cfg.num_layers) if scaled else 0.02)
            if bias:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., inputs] to [..., outputs]."""
        x, weight = x.to(self.dtype), self.weight.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.wide:
            x, weight, bias = widened(x), widened(weight), None if self.bias is None else widened(self.bias)
        return functional.linear(x, weight, bias)


class Table(nn.Embedding):
    """nn.Embedding in the config's `param_dtype`, with its initialisation."""

    def __init__(self, cfg: ModelConfig, rows: int, width: int) -> None:
        super().__init__(rows, width, dtype=dtype_of(cfg.param_dtype))
        if cfg.init != "torch":
            nn.init.normal_(self.weight, 0, 0.02)


class Norm(nn.Module):
    """Layer norm or RMS norm over the last axis, in at least float32."""

    def __init__(self, cfg: ModelConfig, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.eps, self.dtype = kind, cfg.norm_eps, dtype_of(cfg.dtype)
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype_of(cfg.param_dtype)))
        has_bias = kind == "layernorm" and cfg.use_bias
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each row of x [..., width]."""
        x = widened(x)
        if self.kind == "layernorm":
            x = x - x.mean(dim=-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + self.eps) * self.weight
        return (x if self.bias is None else x + self.bias).to(self.dtype)


def make_norm(cfg: ModelConfig, width: int) -> nn.Module:
    """The norm that a config asks for."""
    return nn.Identity() if cfg.norm == "none" else Norm(cfg, width, cfg.norm)


def gelu(x: Tensor) -> Tensor:
    """x times the probability that a standard normal variable is below x."""
    return (widened(x) * 0.5 * (1 + torch.erf(widened(x) / math.sqrt(2)))).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU as its authors approximate it (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": torch.relu, "silu": silu, "swiglu": silu, "geglu": gelu}


class MLP(nn.Module):
    """The feed-forward sublayer; swiglu and geglu (Shazeer 2020, https://arxiv.org/abs/2002.05202) gate `up`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[cfg.activation]
        self.gate = None
        if cfg.activation in ("swiglu", "geglu"):
            self.gate = Linear(cfg, cfg.embed_dim, cfg.resolved.mlp_dim, cfg.use_bias)
        self.up = Linear(cfg, cfg.embed_dim, cfg.resolved.mlp_dim, cfg.use_bias)
        self.down = Linear(cfg, cfg.resolved.mlp_dim, cfg.embed_dim, cfg.use_bias, to_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, T, D] to the same shape."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Returns the angles [T, width / 2] of positions [T]: position times theta^(-2i / width)."""
    frequencies = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=dtype)
    return positions[:, None].to(dtype) * frequencies.to(positions.device)


def rotate(x: Tensor, positions: Tensor, theta: float, layout: str) -> Tensor:
    """Rotates x [B, heads, T, H] by its positions [T] (RoPE, Su et al. 2021, https://arxiv.org/abs/2104.09864)."""
    wide, width = widened(x), x.shape[-1]
    turn = angles(positions, width, theta, wide.dtype)
    if layout == "half":
        first, second = range(width // 2), range(width // 2, width)
    else:
        first, second = range(0, width, 2), range(1, width, 2)
    turned = torch.empty_like(wide)
    turned[..., list(first)] = wide[..., list(first)] * turn.cos() - wide[..., list(second)] * turn.sin()
    turned[..., list(second)] = wide[..., list(first)] * turn.sin() + wide[..., list(second)] * turn.cos()
    return turned.to(x.dtype)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Returns [T, width]: sines in even features, cosines in odd ones (Vaswani et al. 2017, section 3.5)."""
    turn = angles(positions, width, 10000.0, dtype)
    vectors = torch.zeros(len(positions), width, dtype=dtype, device=positions.device)
    vectors[:, 0::2] = turn.sin()
    vectors[:, 1::2] = turn.cos()
    return vectors


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Cap times tanh(x / cap); None leaves x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
