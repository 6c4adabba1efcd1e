"""The lanes of `gpu.py` that run in PyTorch: `python benchmarks/gpu_torch.py LANE...`.

The model is nanoGPT's: one product for queries, keys and values, `F.scaled_dot_product_attention` (flash attention in
bfloat16), trained by `torch.compile`, autocast and fused AdamW; sampled from a static cache under a CUDA graph.
"""

import os
import sys
from collections.abc import Callable

import gpu_lanes
import torch
import transformers
from gpu_lanes import NEW, PROMPT, SIZES, Made, Size
from torch import nn
from torch.nn import functional as F  # noqa: N812

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = os.environ.get("GPU_BENCHMARK_TORCH_BACKEND", "inductor")


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Block(nn.Module):
    """Attention and MLP. With a cache, the keys and values of the tokens are written at `at`, and `mask` is read."""

    def __init__(self, s: Size, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = s.heads, dropout
        self.norm1, self.norm2 = (nn.LayerNorm(s.width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(s.width, 3 * s.width, bias=False), nn.Linear(s.width, s.width, bias=False)
        self.up, self.down = nn.Linear(s.width, 4 * s.width, bias=False), nn.Linear(4 * s.width, s.width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cache=None, at=None, mask=None):
        """One layer."""
        queries, keys, values = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        if cache is None:
            rate = self.rate if self.training else 0.0
            out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate, is_causal=True)
        else:
            for part, new in zip(cache, (keys, values), strict=True):
                part.index_copy_(2, at, new)
            out = F.scaled_dot_product_attention(queries, *cache, attn_mask=mask)
        x = x + self.drop(self.out(out.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """nanoGPT's model without biases; the head is the embedding."""

    def __init__(self, s: Size, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(s.vocab, s.width), nn.Embedding(s.context, s.width)
        self.blocks = nn.ModuleList(Block(s, dropout) for _ in range(s.layers))
        self.norm, self.drop = nn.LayerNorm(s.width, bias=False), nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets=None, caches=None, at=None, mask=None):
        """The mean loss if there are targets, else the logits of the last token."""
        at = torch.arange(tokens.shape[1], device=tokens.device) if at is None else at
        x = self.drop(self.tokens(tokens) + self.places(at))
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], at, mask)
        if targets is None:
            return F.linear(self.norm(x[:, -1]), self.tokens.weight)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(size: str, precision: str, dropout: float = 0.0) -> Made:
    """Some steps: forward, backward, clipping, fused AdamW on float32 parameters."""
    s = SIZES[size]
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    model = GPT(s, dropout).to(DEVICE).train()
    compiled = torch.compile(model, backend=BACKEND)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    text = torch.randint(s.vocab, (1_000_000,), device=DEVICE)
    window = torch.arange(s.context + 1, device=DEVICE)

    def run() -> None:
        for _ in range(s.steps):
            windows = text[torch.randint(len(text) - s.context, (s.batch, 1), device=DEVICE) + window]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = compiled(windows[:, :-1], windows[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):  # waits for the device
            raise ValueError(f"the loss is {loss.item()}")

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run()
    return run, {"memory": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0}


def decode_hf(batch: int, size: str, static: bool) -> Made:
    """`generate` of Hugging Face's GPT-2; with a static cache it compiles its steps on a GPU."""
    s = SIZES[size]
    sizes = {"n_positions": PROMPT + NEW, "n_embd": s.width, "n_layer": s.layers, "n_head": s.heads}
    config = transformers.GPT2Config(vocab_size=s.vocab, **sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).to(DEVICE, torch.bfloat16).eval()
    settings = {"do_sample": True, "top_k": 0, "use_cache": True, "pad_token_id": 0, "max_new_tokens": NEW}
    if static:
        settings["cache_implementation"] = "static"
    prompt = torch.zeros(batch, PROMPT, dtype=torch.long, device=DEVICE)

    @torch.no_grad()
    def run() -> None:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        synchronize()
        if out.shape != (batch, PROMPT + NEW):
            raise ValueError(f"{tuple(out.shape)} tokens came, not {(batch, PROMPT + NEW)}")

    run()  # compiles in its second call too
    return run, {}


@torch.no_grad()
def decode_graph(batch: int, size: str) -> Made:
    """A sampler of its own: a static cache, one step captured as a CUDA graph and replayed."""
    s, slots = SIZES[size]._replace(context=PROMPT + NEW), PROMPT + NEW
    model = GPT(s).to(DEVICE, torch.bfloat16).eval()
    shape = (batch, s.heads, slots, s.width // s.heads)
    caches = [[torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)] for _ in range(s.layers)]
    token, at = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    prompt, places = torch.zeros(batch, PROMPT, dtype=torch.long, device=DEVICE), torch.arange(slots, device=DEVICE)

    def sampled(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, caches=caches, at=at, mask=places <= at[:, None])
        weights = torch.softmax(logits.float(), dim=-1)
        return torch.argmax(weights / torch.empty_like(weights).exponential_(1), dim=-1, keepdim=True)

    def step() -> None:
        token.copy_(sampled(token, at))
        at.add_(1)

    replay = captured(step)

    @torch.no_grad()
    def run() -> None:
        token.copy_(sampled(prompt, places[:PROMPT]))
        at.fill_(PROMPT)
        for _ in range(NEW - 1):
            replay()
        synchronize()

    return run, {}


def captured(step: Callable[[], None]) -> Callable[[], object]:
    """The step as a CUDA graph; without CUDA the step itself."""
    if DEVICE == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def flash(length: int) -> Made:
    """Forward and backward pass of one causal attention without a window: batch 1, 12 heads of 64."""
    shape = (1, 12, length, 64)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(3)]

    def run() -> None:
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(out.float().sum(), inputs)
        synchronize()

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run()
    return run, {"memory": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0}


def peak(precision: str, n: int) -> Made:
    """Ten products of two n x n matrices."""
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    x = torch.randn(n, n, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32, device=DEVICE) * n**-0.5

    def run() -> None:
        for _ in range(10):
            torch.matmul(x, x)
        synchronize()

    return run, {"flops": 10 * 2 * n**3}


def make(lane: str) -> Made:
    """Builds a lane."""
    kind, *rest = lane.split(":")
    if kind == "train":
        return train(*rest[:2], dropout=0.2 if rest[2:] == ["dropout"] else 0.0)
    if kind in ("eager", "static"):
        return decode_hf(int(rest[0]), rest[1], static=kind == "static")
    if kind == "graph":
        return decode_graph(int(rest[0]), rest[1])
    return flash(int(rest[0])) if kind == "flash" else peak(rest[0], int(rest[1]))


if __name__ == "__main__":
    gpu_lanes.serve(sys.argv[1:], make)
