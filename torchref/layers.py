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
        if cfg.norm_unit_offset:
            nn.init.zeros_(self.weight)
        self.offset = 1 if cfg.norm_unit_offset else 0
        has_bias = kind == "layernorm" and (cfg.use_bias if cfg.norm_bias is None else cfg.norm_bias)
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each row of x [..., width]."""
        x = widened(x)
        if self.kind == "layernorm":
            x = x - x.mean(dim=-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + self.eps) * (self.offset + widened(self.weight))
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


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": torch.relu, "silu": silu}
GATES = {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh}


class MLP(nn.Module):
    """The feed-forward sublayer. Those of GATES (Shazeer 2020, https://arxiv.org/abs/2002.05202) gate `up`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = (ACTIVATIONS | GATES)[cfg.activation]
        self.gate = None
        if cfg.activation in GATES:
            self.gate = Linear(cfg, cfg.embed_dim, cfg.resolved.mlp_dim, cfg.use_bias)
        self.up = Linear(cfg, cfg.embed_dim, cfg.resolved.mlp_dim, cfg.use_bias)
        self.down = Linear(cfg, cfg.resolved.mlp_dim, cfg.embed_dim, cfg.use_bias, to_residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, T, D] to the same shape."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def frequencies(width: int, theta: float) -> list[float]:
    """The width / 2 frequencies theta^(-2i / width) in radians a token."""
    return [theta ** (-2 * i / width) for i in range(width // 2)]


def scaled_frequencies(cfg: ModelConfig, width: int, theta: float, factor: float) -> list[float]:
    """The frequencies of a model whose context was extended: see ModelConfig.rope_scaling.

    linear: Chen et al. 2023, https://arxiv.org/abs/2306.15595; yarn: Peng et al. 2023,
    https://arxiv.org/abs/2309.00071, whose ramp runs over the index of the frequency.
    """
    original = cfg.rope_original_len or cfg.max_seq_len
    plain = frequencies(width, theta)
    if cfg.rope_scaling == "none":
        return plain
    if cfg.rope_scaling == "linear":
        return [frequency / factor for frequency in plain]
    if cfg.rope_scaling == "llama3":
        slow, fast = cfg.rope_ramp or (1.0, 4.0)
        scaled = []
        for frequency in plain:
            turns = original / (2 * math.pi / frequency)
            if turns < slow:
                scaled.append(frequency / factor)
            elif turns > fast:
                scaled.append(frequency)
            else:
                smooth = (turns - slow) / (fast - slow)
                scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
        return scaled
    slow, fast = cfg.rope_ramp or (1.0, 32.0)
    ends = [width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
    start, stop = float(max(math.floor(ends[0]), 0)), float(min(math.ceil(ends[1]), width - 1))
    if start == stop:
        stop += 0.001
    scaled = []
    for i, frequency in enumerate(plain):
        ramp = min(max((i - start) / (stop - start), 0.0), 1.0)
        scaled.append(frequency / factor * ramp + frequency * (1 - ramp))
    return scaled


def magnitude(cfg: ModelConfig, factor: float) -> float:
    """What yarn multiplies the rotated features by (section 3.4: the root of the softmax's temperature)."""
    if cfg.rope_scaling != "yarn" or factor == 1:
        return 1.0
    if cfg.rope_attention_factor is not None:
        return cfg.rope_attention_factor
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def angles(positions: Tensor, turns: list[float], dtype: torch.dtype) -> Tensor:
    """Returns the angles [T, len(turns)]: position times frequency."""
    return positions[:, None].to(dtype) * torch.tensor(turns, dtype=dtype).to(positions.device)


def rotate(x: Tensor, positions: Tensor, turns: list[float], layout: str, size: float = 1.0) -> Tensor:
    """Rotates x [B, heads, T, H] by its positions [T] (RoPE, Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Pair i turns by turns[i] radians a token and is multiplied by `size`; features behind the pairs stay as they are.
    """
    wide, width = widened(x), 2 * len(turns)
    turn = angles(positions, turns, wide.dtype)
    if layout == "half":
        first, second = range(width // 2), range(width // 2, width)
    else:
        first, second = range(0, width, 2), range(1, width, 2)
    turned = wide.clone()
    turned[..., list(first)] = (wide[..., list(first)] * turn.cos() - wide[..., list(second)] * turn.sin()) * size
    turned[..., list(second)] = (wide[..., list(first)] * turn.sin() + wide[..., list(second)] * turn.cos()) * size
    return turned.to(x.dtype)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Returns [T, width]: sines in even features, cosines in odd ones (Vaswani et al. 2017, section 3.5)."""
    turn = angles(positions, frequencies(width, 10000.0), dtype)
    vectors = torch.zeros(len(positions), width, dtype=dtype, device=positions.device)
    vectors[:, 0::2] = turn.sin()
    vectors[:, 1::2] = turn.cos()
    return vectors


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Cap times tanh(x / cap); None leaves x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
