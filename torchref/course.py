"""torchref's layers, model and sampler with the calls of CMU 15-780's hand-out: sizes in, an additive mask, a KV cache.

    from torchref.course import LanguageModel, SelfAttention, TransformerBlockPreNorm
    from torchref.course import sample_transformer_cached, sample_transformer_naive

Every linear map is initialised as nn.Linear, with a bias. `fields` are further fields of ModelConfig, such as
activation="relu", use_bias=False or dtype="float64".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from torchref.attention import SelfAttention as MaskedAttention
from torchref.model import Block, Transformer
from torchref.sampling import generate

ANY_NUMBER = 2**31 - 1
"""The max_seq_len of a layer that has none."""


class _Layer(nn.Module):
    """A layer of torchref that takes an additive mask and counts the tokens in its cache."""

    def __init__(self, max_seq_len: int | None) -> None:
        super().__init__()
        self.max_seq_len, self.seen = max_seq_len, 0

    def clear_cache(self) -> None:
        """Forgets every token seen."""
        self.seen = 0
        for module in self.modules():
            if isinstance(module, MaskedAttention):
                module.clear_cache()

    def _read(self, layer: MaskedAttention | Block, X: Tensor, mask: Tensor | None, use_kv_cache: bool) -> Tensor:
        """What torchref's layer makes of X at the next positions, with the mask; None is a mask of zeros."""
        width = layer.cfg.embed_dim
        if X.ndim != 3 or 0 in X.shape or X.shape[2] != width:
            raise ValueError(f"X is {list(X.shape)}: give [B, T, {width}], at least one row and one token")
        past, length = self.seen if use_kv_cache else 0, X.shape[1]
        end = past + length
        if self.max_seq_len is not None and end > self.max_seq_len:
            raise ValueError(
                f"{end} tokens are more than max_seq_len = {self.max_seq_len}: give fewer, or clear_cache()"
            )
        if mask is None:
            mask = X.new_zeros(length, end)
        if mask.dtype == torch.bool:
            raise ValueError("mask is of bool: give numbers that are added to the scores, 0 and -inf")
        if mask.shape[-2:] not in ((length, length), (length, end)):
            raise ValueError(f"mask is {list(mask.shape)} for {length} new tokens of {end}: give [{length}, {end}]")
        if mask.shape[-1] < end:
            mask = nn.functional.pad(mask, (past, 0))
        out = layer(X, torch.arange(past, end, device=X.device), use_kv_cache, mask)
        if use_kv_cache:
            self.seen = end
        return out


class SelfAttention(_Layer):
    """Multi-head self-attention of width d. Causal only if the mask says so.

    Args:
      max_seq_len: the most tokens it reads, those in its cache included; None = any number.
    """

    def __init__(self, d: int, num_heads: int, max_seq_len: int | None = None, **fields: Any) -> None:
        super().__init__(max_seq_len)
        cfg = _config(max_seq_len, embed_dim=d, num_heads=num_heads, **fields)
        self.attention = MaskedAttention(cfg, cfg.layer_settings[0])

    def forward(self, X: Tensor, mask: Tensor | None = None, use_kv_cache: bool = False) -> Tensor:
        """Maps X [B, T, d] to the same shape.

        With `use_kv_cache`, X goes on after the S tokens of earlier such calls, until `clear_cache`.

        Args:
          mask: [T, S + T], added to the scores; a mask [T, T] hides none of the S tokens. None hides nothing.

        Raises:
          ValueError: X of another width, or empty; more tokens than max_seq_len; a mask of bool or of another shape.
        """
        return self._read(self.attention, X, mask, use_kv_cache)


class TransformerBlockPreNorm(_Layer):
    """X + attention(norm(X)), then the same with an MLP of width d_ff, by default 4 d."""

    def __init__(
        self, d: int, num_heads: int, max_seq_len: int | None = None, d_ff: int | None = None, **fields: Any
    ) -> None:
        super().__init__(max_seq_len)
        cfg = _config(max_seq_len, embed_dim=d, num_heads=num_heads, mlp_dim=d_ff, **fields)
        self.block = Block(cfg, cfg.layer_settings[0])

    def forward(self, X: Tensor, mask: Tensor | None = None, use_kv_cache: bool = False) -> Tensor:
        """Maps X [B, T, d] to the same shape; everything else as in SelfAttention."""
        return self._read(self.block, X, mask, use_kv_cache)


class LanguageModel(Transformer):
    """Token and learned position embeddings, causal pre-norm blocks, a final norm and a head of its own.

    `model(tokens)` maps integers [B, T] to logits [B, T, vocab_size]. `model(tokens, use_kv_cache=True)` goes on after
    the tokens of earlier such calls, until `model.clear_cache()`. More than max_seq_len tokens, or none, raise a
    ValueError.
    `jaxlm.convert.from_torchref(model.cfg, model.state_dict())` gives the parameters of `jaxlm.build_model(model.cfg)`.
    """

    def __init__(
        self,
        vocab_size: int,
        d: int,
        num_heads: int,
        num_layers: int,
        max_seq_len: int,
        d_ff: int | None = None,
        **fields: Any,
    ) -> None:
        head = {"tie_embeddings": False, "head_bias": True, "position": "learned"}
        sizes = {"embed_dim": d, "num_heads": num_heads, "num_layers": num_layers, "mlp_dim": d_ff}
        super().__init__(_config(max_seq_len, **{"vocab_size": vocab_size, **head, **sizes, **fields}))

    def forward(self, tokens: Tensor, use_kv_cache: bool = False, documents: Tensor | None = None) -> Tensor:
        """Maps integers [B, T] to logits [B, T, vocab_size]; for `documents` see Transformer."""
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens are {list(tokens.shape)}: give [B, T], at least one row and one token")
        return super().forward(tokens, use_kv_cache, documents)


def sample_transformer_naive(
    model: LanguageModel,
    prompt: Tensor | Sequence[int],
    num_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """New tokens after a prompt [T] or prompts [B, T]: [num_tokens] or [B, num_tokens], without the prompt.

    Each is drawn from the logits over the whole history (its last max_seq_len tokens) divided by the temperature; 0
    takes the most likely one. Without a generator, torch's global one draws.

    Raises:
      ValueError: an empty prompt.
    """
    return _sample(model, prompt, num_tokens, temperature, generator, use_kv_cache=False)


def sample_transformer_cached(
    model: LanguageModel,
    prompt: Tensor | Sequence[int],
    num_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same tokens as `sample_transformer_naive`, reading each once, by the KV cache.

    Raises:
      ValueError: an empty prompt; prompt and new tokens but the last are more than max_seq_len.
    """
    return _sample(model, prompt, num_tokens, temperature, generator, use_kv_cache=True)


def _sample(
    model: LanguageModel,
    prompt: Tensor | Sequence[int],
    num_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    use_kv_cache: bool,
) -> Tensor:
    prompt = torch.as_tensor(prompt)
    if prompt.ndim not in (1, 2) or 0 in prompt.shape:
        raise ValueError(f"prompt is {list(prompt.shape)}: give [T] or [B, T], at least one row and one token")
    options: dict[str, Any] = {"use_kv_cache": use_kv_cache, "generator": generator}
    new = generate(model, torch.atleast_2d(prompt), num_tokens, temperature, **options)
    return new if prompt.ndim > 1 else new[0]


def _config(max_seq_len: int | None, **fields: Any) -> ModelConfig:
    usual = {"vocab_size": 1, "num_layers": 1, "position": "none", "init": "torch"}
    return ModelConfig(max_seq_len=ANY_NUMBER if max_seq_len is None else max_seq_len, **{**usual, **fields})
