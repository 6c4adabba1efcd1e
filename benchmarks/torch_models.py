"""PyTorch's contestants: a model such as nanoGPT's from the pieces of torch.nn, and those of other projects.

torchref is written to be read and has every attention score in memory, so it says nothing about PyTorch's speed.
`FusedTransformer` computes the same function of the same config (parity_tests/test_benchmarks.py) with fused attention,
norms and activations, and with queries, keys and values in one product.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from jaxlm.config import ModelConfig, OptimConfig

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "swiglu": functional.silu,
}
Loss = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Causal self-attention by F.scaled_dot_product_attention; a window is a mask, as PyTorch has no other form."""

    def __init__(self, cfg: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = cfg.num_heads, cfg.resolved.num_kv_heads, cfg.resolved.head_dim
        outputs = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv = nn.Linear(cfg.embed_dim, outputs, cfg.use_bias)
        self.out = nn.Linear(self.heads * self.width, cfg.embed_dim, cfg.use_bias)
        mask = None
        if window is not None and window < cfg.max_seq_len:
            behind = torch.arange(cfg.max_seq_len)[:, None] - torch.arange(cfg.max_seq_len)
            mask = (behind >= 0) & (behind < window)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Maps x [B, T, D] to the same shape; `turn` are the cosines and sines of RoPE."""
        heads = self.qkv(x).unflatten(2, (-1, self.width)).transpose(1, 2)  # [B, N + 2 K, T, H]
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if turn is not None:
            q, k = (a * turn[0] + torch.cat((-a.chunk(2, -1)[1], a.chunk(2, -1)[0]), -1) * turn[1] for a in (q, k))
        shared = self.kv_heads < self.heads
        out = functional.scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.mask is None, enable_gqa=shared
        )
        return self.out(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward sublayer, gated in SwiGLU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[cfg.activation]
        self.gate = None
        if cfg.activation == "swiglu":
            self.gate = nn.Linear(cfg.embed_dim, cfg.resolved.mlp_dim, cfg.use_bias)
        self.up = nn.Linear(cfg.embed_dim, cfg.resolved.mlp_dim, cfg.use_bias)
        self.down = nn.Linear(cfg.resolved.mlp_dim, cfg.embed_dim, cfg.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, T, D] to the same shape."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each after a norm and with a residual sum."""

    def __init__(self, cfg: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(cfg), _norm(cfg)
        self.attention, self.mlp = Attention(cfg, window), MLP(cfg)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Maps x [B, T, D] to the same shape."""
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.mlp(self.mlp_norm(x))


class FusedTransformer(nn.Module):
    """A transformer of the presets' kinds: learned positions or RoPE, layer or RMS norm, GELU or SwiGLU, windows."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.embed_dim)
        self.position_embedding = None
        self.turn = None
        if cfg.position == "learned":
            self.position_embedding = nn.Embedding(cfg.max_seq_len, cfg.embed_dim)
        else:
            half = cfg.resolved.head_dim // 2
            frequencies = torch.tensor([cfg.rope_theta ** (-i / half) for i in range(half)])
            angles = (torch.arange(cfg.max_seq_len)[:, None] * frequencies).repeat(1, 2)
            self.turn = angles.cos(), angles.sin()
        self.blocks = nn.ModuleList(Block(cfg, window) for window in cfg.layer_windows)
        self.final_norm = _norm(cfg)
        self.head = nn.Linear(cfg.embed_dim, cfg.vocab_size, cfg.head_bias)
        for name, parameter in self.named_parameters():  # as GPT-2
            if parameter.ndim > 1:
                to_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, 0, 0.02 / (2 * cfg.num_layers) ** 0.5 if to_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps integers [B, max_seq_len] to logits [B, max_seq_len, V]."""
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight
        for block in self.blocks:
            x = block(x, self.turn)
        return self.head(self.final_norm(x))


def _norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.embed_dim, cfg.norm_eps)
    return nn.LayerNorm(cfg.embed_dim, cfg.norm_eps, bias=cfg.use_bias)


def fused(cfg: ModelConfig) -> tuple[nn.Module, Loss]:
    """The model and its mean loss in nats."""
    model = FusedTransformer(cfg)
    return model, lambda x, y: functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def hugging_face(cfg: ModelConfig) -> tuple[nn.Module, Loss]:
    """GPT-2, or Llama if the config has RoPE. GPT-2 always has biases; this Llama's layers have no windows."""
    options = {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie_embeddings, "use_cache": False}
    special = {"bos_token_id": None, "eos_token_id": None}
    if cfg.position == "rope":
        config = transformers.LlamaConfig(
            hidden_size=cfg.embed_dim,
            intermediate_size=cfg.resolved.mlp_dim,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.resolved.num_kv_heads,
            max_position_embeddings=cfg.max_seq_len,
            rms_norm_eps=cfg.norm_eps,
            **options,
            **special,
        )
        model: nn.Module = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            n_positions=cfg.max_seq_len,
            n_embd=cfg.embed_dim,
            n_layer=cfg.num_layers,
            n_head=cfg.num_heads,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[cfg.activation],
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **options,
            **special,
        )
        model = transformers.GPT2LMHeadModel(config)
    return model, lambda x, y: functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


def nanogpt(cfg: ModelConfig, folder: str) -> tuple[nn.Module, Loss]:
    """nanoGPT's own model, from the user's copy. It always ties the embeddings and has the exact GELU.

    Raises:
      ValueError: nanoGPT has no such model.
    """
    if cfg.position == "rope":
        raise ValueError("nanoGPT has no RoPE")
    found = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = importlib.util.module_from_spec(found)
    sys.modules["nanogpt_model"] = module  # where dataclasses and torch.compile look for it
    found.loader.exec_module(module)
    sizes = {"n_layer": cfg.num_layers, "n_head": cfg.num_heads, "n_embd": cfg.embed_dim, "dropout": 0.0}
    config = module.GPTConfig(block_size=cfg.max_seq_len, vocab_size=cfg.vocab_size, bias=cfg.use_bias, **sizes)
    model = module.GPT(config)
    return model, lambda x, y: model(x, y)[1]


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in PyTorch's fastest form (fused), decay on matrices only; `optim` as in jaxlm, at a constant rate."""
    decays = {True: optim.weight_decay, False: 0.0}
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) is matrix], "weight_decay": decay}
        for matrix, decay in decays.items()
    ]
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.b1, optim.b2), fused=True)
