"""The language models: every family of ModelConfig, with one interface."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from torchref.attention import SelfAttention
from torchref.layers import MLP, Linear, Table, dtype_of, make_norm, sinusoids, softcap, widened
from torchref.recurrent import RecurrentLayer


class LanguageModel(nn.Module):
    """The interface of every family: `model(tokens)` maps integers [B, T] to logits [B, T, V] in at least float32.

    `model(tokens, use_kv_cache=True)` continues after the tokens of earlier such calls, until `model.clear_cache()`.
    Each layer keeps at most max_seq_len keys: past them the model computes as if no window were wider than that. A
    learned position table ends there.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.seen = 0

    def clear_cache(self) -> None:
        """Forgets every token seen."""
        self.seen = 0
        for module in self.modules():
            if isinstance(module, SelfAttention | RecurrentLayer):
                module.clear_cache()

    def _positions(self, tokens: Tensor, use_kv_cache: bool) -> Tensor:
        first = self.seen if use_kv_cache else 0
        if use_kv_cache:
            self.seen += tokens.shape[1]
        return torch.arange(first, first + tokens.shape[1], device=tokens.device)


class Bigram(LanguageModel):
    """The logits after a token are its row of a V x V table."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.table = Table(cfg, cfg.vocab_size, cfg.vocab_size)

    def forward(self, tokens: Tensor, use_kv_cache: bool = False) -> Tensor:
        """See LanguageModel."""
        logits = self.table(tokens).to(dtype_of(self.cfg.dtype))
        return softcap(widened(logits), self.cfg.final_softcap)


class Embedded(LanguageModel):
    """Embedding, layers and head, which the other families share. Without layers it is the embedding bigram."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.embedding = Table(cfg, cfg.vocab_size, cfg.embed_dim)
        self.blocks = nn.ModuleList(self._layers())
        self.head = Linear(cfg, cfg.embed_dim, cfg.vocab_size, cfg.head_bias, wide=True)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _layers(self) -> list[nn.Module]:
        return []

    def _embed(self, tokens: Tensor) -> Tensor:
        """Maps [B, T] to [B, T, D]. Embedding dropout (Gal & Ghahramani 2016) drops whole rows of the table."""
        table = self.embedding.weight
        kept = functional.dropout(torch.ones_like(table[:, :1]), self.cfg.embedding_dropout, self.training)
        vectors = (table * kept)[tokens].to(dtype_of(self.cfg.dtype))
        return vectors * torch.tensor(self.cfg.embedding_scale, dtype=vectors.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        return softcap(self.head(x) / self.cfg.logit_divisor, self.cfg.final_softcap)

    def forward(self, tokens: Tensor, use_kv_cache: bool = False) -> Tensor:
        """See LanguageModel."""
        x = functional.dropout(self._embed(tokens), self.cfg.dropout, self.training)
        positions = self._positions(tokens, use_kv_cache)
        for block in self.blocks:
            x = block(x, positions, use_kv_cache)
        return self._logits(x)


class Recurrent(Embedded):
    """L recurrent layers of width D between embedding and head."""

    def _layers(self) -> list[nn.Module]:
        return [RecurrentLayer(self.cfg) for _ in range(self.cfg.num_layers)]


class Block(nn.Module):
    """Attention and MLP, each with norms, dropout and residual sum."""

    def __init__(self, cfg: ModelConfig, layer: LayerSettings) -> None:
        super().__init__()
        self.cfg = cfg
        self.attention_norm = make_norm(cfg, cfg.embed_dim)
        self.attention = SelfAttention(cfg, layer)
        if cfg.norm_order == "sandwich":
            self.attention_post_norm = make_norm(cfg, cfg.embed_dim)
        if cfg.resolved.mlp_dim:
            self.mlp = MLP(cfg)
            if cfg.block_layout != "parallel_one_norm":
                self.mlp_norm = make_norm(cfg, cfg.embed_dim)
            if cfg.norm_order == "sandwich":
                self.mlp_post_norm = make_norm(cfg, cfg.embed_dim)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        use_kv_cache: bool = False,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Maps x [B, T, D] to the same shape; for `mask` and `documents` see SelfAttention."""

        def attend(y: Tensor) -> Tensor:
            return self.attention(y, positions, use_kv_cache, mask, documents)

        if self.cfg.block_layout == "parallel":
            of_attention, of_mlp = attend(self.attention_norm(x)), self.mlp(self.mlp_norm(x))
            return x + self._scaled(of_attention) + self._scaled(of_mlp)
        if self.cfg.block_layout == "parallel_one_norm":
            y = self.attention_norm(x)
            return x + self._scaled(attend(y)) + self._scaled(self.mlp(y))
        x = self._sublayer(x, attend, "attention")
        return self._sublayer(x, self.mlp, "mlp") if self.cfg.resolved.mlp_dim else x

    def _sublayer(self, x: Tensor, function: Callable[[Tensor], Tensor], name: str) -> Tensor:
        norm = getattr(self, f"{name}_norm")
        if self.cfg.norm_order == "post":
            return norm(self._joined(x, function(x)))
        if self.cfg.norm_order == "reordered":
            return self._joined(x, norm(function(x)))
        out = function(norm(x))
        if self.cfg.norm_order == "sandwich":
            out = getattr(self, f"{name}_post_norm")(out)
        return self._joined(x, out)

    def _joined(self, x: Tensor, out: Tensor) -> Tensor:
        out = self._scaled(out)
        return x + out if self.cfg.residual else out

    def _scaled(self, out: Tensor) -> Tensor:
        return functional.dropout(out, self.cfg.dropout, self.training) * self.cfg.residual_scale


class Transformer(Embedded):
    """A decoder-only transformer."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        if cfg.position == "learned":
            self.position_embedding = Table(cfg, cfg.max_seq_len, cfg.embed_dim)
        self.final_norm = nn.Identity() if cfg.norm_order == "post" else make_norm(cfg, cfg.embed_dim)

    def _layers(self) -> list[nn.Module]:
        return [Block(self.cfg, layer) for layer in self.cfg.layer_settings]

    def forward(self, tokens: Tensor, use_kv_cache: bool = False, documents: Tensor | None = None) -> Tensor:
        """See LanguageModel. A token attends to its own document alone if `documents` [B, T] numbers them.

        Positions count from the beginning of the row all the same.

        Raises:
          ValueError: positions beyond a learned table.
        """
        cfg = self.cfg
        dtype = dtype_of(cfg.dtype)
        end = tokens.shape[1] + (self.seen if use_kv_cache else 0)
        if cfg.position == "learned" and end > cfg.max_seq_len:
            raise ValueError(f"{end} tokens are beyond the learned position table, max_seq_len = {cfg.max_seq_len}")
        positions = self._positions(tokens, use_kv_cache)
        x = self._embed(tokens)
        if cfg.position == "learned":
            x = x + self.position_embedding(positions).to(dtype)
        elif cfg.position == "sinusoidal":
            x = x + sinusoids(positions, cfg.embed_dim, torch.promote_types(dtype, torch.float32)).to(dtype)
        x = functional.dropout(x, cfg.dropout, self.training)
        for block in self.blocks:
            x = block(x, positions, use_kv_cache, documents=documents)
        return self._logits(self.final_norm(x))


FAMILIES: dict[str, type[LanguageModel]] = {
    "transformer": Transformer,
    "bigram": Bigram,
    "embedding_bigram": Embedded,
    "recurrent": Recurrent,
}


def build_model(cfg: ModelConfig) -> LanguageModel:
    """Builds the network that a config describes, with fresh parameters from torch's global generator.

    `attention_impl`, `scan_layers` and `remat` choose how jaxlm computes the same function and change nothing here.
    """
    return FAMILIES[cfg.family](cfg)
