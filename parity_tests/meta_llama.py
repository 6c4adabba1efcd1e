"""A Llama as Meta writes it, with rotations by complex numbers, and writers of Meta's and llama2.c's files."""

import json
import math

import llama2c
import numpy as np
import torch
from foreign import randomised
from torch import nn

SIZES = {"dim": 18, "n_layers": 2, "n_heads": 3, "vocab_size": 37, "multiple_of": 5, "norm_eps": 1e-5}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 17))


def hidden_width(dim, multiple_of, ffn_dim_multiplier=None):
    hidden = int(2 * 4 * dim / 3)
    hidden = int(ffn_dim_multiplier * hidden) if ffn_dim_multiplier else hidden
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def scaled(frequencies, factor):
    """Llama 3.1's change of the frequencies, one at a time."""
    low, high, old_context = 1, 4, 8192
    found = []
    for frequency in frequencies:
        wave = 2 * math.pi / frequency
        if wave < old_context / high:
            found.append(frequency)
        elif wave > old_context / low:
            found.append(frequency / factor)
        else:
            smooth = (old_context / wave - low) / (high - low)
            found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.stack(found)


class Norm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, heads * self.width, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.wo = nn.Linear(heads * self.width, dim, bias=False)

    def forward(self, x, turns):
        def split(y, heads):
            return y.view(*y.shape[:2], heads, self.width)

        def turned(y):
            pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns[None, : y.shape[1], None]).flatten(3)

        q, k = turned(split(self.wq(x), self.heads)), turned(split(self.wk(x), self.kv_heads))
        v = split(self.wv(x), self.kv_heads)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 2) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.width)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.wo(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, hidden, eps):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads, kv_heads), FeedForward(dim, hidden)
        self.attention_norm, self.ffn_norm = Norm(dim, eps), Norm(dim, eps)

    def forward(self, x, turns):
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """Meta's names of tensors; `args` are those of params.json."""

    def __init__(self, tied=False, **changes):
        super().__init__()
        self.args = args = {**SIZES, **changes}
        dim, heads = args["dim"], args["n_heads"]
        hidden = args.get("hidden_dim") or hidden_width(dim, args["multiple_of"], args.get("ffn_dim_multiplier"))
        self.hidden, self.kv_heads = hidden, args.get("n_kv_heads") or heads
        self.tok_embeddings = nn.Embedding(args["vocab_size"], dim)
        eps = args["norm_eps"]
        self.layers = nn.ModuleList(Block(dim, heads, self.kv_heads, hidden, eps) for _ in range(args["n_layers"]))
        self.norm, self.output = Norm(dim, eps), nn.Linear(dim, args["vocab_size"], bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens):
        width = self.args["dim"] // self.args["n_heads"]
        frequencies = self.args.get("rope_theta", 1e4) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        if self.args.get("use_scaled_rope"):
            frequencies = scaled(frequencies, self.args["rope_scaling_factor"])
        angles = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float64), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, turns)
        return self.output(self.norm(x))


def meta_llama(tied=False, **changes):
    return randomised(MetaLlama(tied, **changes)).double()


def save_meta(model, folder, **changes):
    """params.json and consolidated.00.pth; `changes` are entries of params.json."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**model.args, **changes}))
    torch.save({**model.state_dict(), "rope.freqs": torch.ones(3)}, folder / "consolidated.00.pth")
    return folder


def save_parts(model, folder, parts, by_tokens):
    """The same, cut for model parallelism; the embedding by tokens (Llama 3) or by features (Llama 1 and 2)."""
    save_meta(model, folder)
    axes = {"tok_embeddings": 0 if by_tokens else 1, "wo": 1, "w2": 1}
    for part in range(parts):
        state = {}
        for name, tensor in model.state_dict().items():
            whole = "norm" in name
            axis = axes.get(name.split(".")[-2], 0)
            state[name] = tensor.clone() if whole else tensor.chunk(parts, axis)[part].clone()
        torch.save(state, folder / f"consolidated.{part:02}.pth")
    return folder


def save_checkpoint(model, path, prefix=""):
    """The checkpoint of llama2.c's training."""
    names = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of")
    args = {name: model.args[name] for name in names} | {"n_kv_heads": model.kv_heads, "max_seq_len": 23}
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    record = {"model": state, "model_args": {**args, "dropout": 0.1}, "optimizer": {}, "iter_num": 3, "config": {}}
    torch.save({**record, "best_val_loss": torch.tensor(1.5)}, path)
    return path


def save_export(model, path, version, tied):
    """An export of llama2.c, in float32."""
    args = {**model.args, "hidden_dim": model.hidden, "n_kv_heads": model.kv_heads, "max_seq_len": 23}
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    return llama2c.write(path, args, state, version, tied)
