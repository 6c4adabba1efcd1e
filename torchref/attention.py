"""Attention: the transformer's sublayer, and a single head with its derivative written by hand."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from torchref.layers import Linear, Norm, dtype_of, magnitude, rotate, scaled_frequencies, softcap, widened


class SelfAttention(nn.Module):
    """Causal self-attention with every option of the config: keys are repeated for each query head, the mask is full.

    With `use_kv_cache` the module keeps the keys and values of the last max_seq_len tokens from call to call, until
    `clear_cache`; a query then sees at most the last max_seq_len tokens.
    """

    def __init__(self, cfg: ModelConfig, layer: LayerSettings) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        heads, width = cfg.num_heads, cfg.resolved.head_dim
        shared = heads if cfg.kv_sharing == "mean_pooled" else cfg.resolved.num_kv_heads
        bias = cfg.use_bias if cfg.qkv_bias is None else cfg.qkv_bias
        self.query = Linear(cfg, cfg.embed_dim, heads * width, bias)
        self.key = Linear(cfg, cfg.embed_dim, shared * width, bias)
        self.value = Linear(cfg, cfg.embed_dim, shared * cfg.resolved.value_head_dim, bias)
        if cfg.qk_norm:
            of_all = cfg.qk_norm_over == "projection"
            self.query_norm = Norm(cfg, heads * width if of_all else width, "rmsnorm")
            self.key_norm = Norm(cfg, cfg.resolved.num_kv_heads * width if of_all else width, "rmsnorm")
        hidden = cfg.score_dim or width
        if cfg.attention_score == "multiplicative":
            self.score_weight = self._weight(width, width, width)
        elif cfg.attention_score == "concat":
            self.score_key, self.score_query = (self._weight(2 * width, width) for _ in range(2))
        elif cfg.attention_score == "additive":
            self.score_key, self.score_query = (self._weight(2 * width, width, hidden) for _ in range(2))
            self.score_out = self._weight(hidden, hidden)
        if cfg.attention_out_proj:
            joined = cfg.attention_maps * cfg.resolved.value_head_dim
            bias = cfg.use_bias if cfg.attention_out_bias is None else cfg.attention_out_bias
            self.out = Linear(cfg, joined, cfg.embed_dim, bias, to_residual=True)
        self.softmax = nn.Softmax(dim=-1)  # a module, so that a hook can read the attention weights
        self.clear_cache()

    def _weight(self, fan_in: int, *shape: int) -> nn.Parameter:
        """A weight of the attention score, with one entry for each query head."""
        weight = torch.empty(self.cfg.num_heads, *shape, dtype=dtype_of(self.cfg.param_dtype))
        if self.cfg.init == "torch":
            return nn.Parameter(weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)))
        return nn.Parameter(weight.normal_(0, 0.02))

    def clear_cache(self) -> None:
        """Forgets all keys and values."""
        self.cache: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        use_kv_cache: bool = False,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Maps x [B, T, D] at `positions` [T] to [B, T, D].

        A `mask`, which must broadcast to [T, keys], is added to the scores in place of the causal mask and the window.
        With the numbers of the tokens' `documents` [B, T], a token sees those of its own document alone.
        """
        cfg, sizes, (batch, length, _) = self.cfg, self.cfg.resolved, x.shape
        groups = cfg.num_heads // sizes.num_kv_heads
        queries = self.query(x).unflatten(2, (-1, sizes.head_dim))
        keys = self.key(x).unflatten(2, (-1, sizes.head_dim))
        values = self.value(x).unflatten(2, (-1, sizes.value_head_dim))
        if cfg.kv_sharing == "mean_pooled":
            keys, values = (a.unflatten(2, (sizes.num_kv_heads, groups)).mean(dim=3) for a in (keys, values))
        if cfg.qk_norm and cfg.qk_norm_over == "head":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        elif cfg.qk_norm:
            queries = self.query_norm(queries.flatten(2)).view_as(queries)
            keys = self.key_norm(keys.flatten(2)).view_as(keys)
        queries, keys, values = (a.transpose(1, 2) for a in (queries, keys, values))  # [B, heads, T, width]
        if cfg.position == "rope":
            theta, factor = self.layer.rope_theta, self.layer.rope_factor
            turns = scaled_frequencies(cfg, cfg.rotary_dim or sizes.head_dim, theta, factor)
            size = magnitude(cfg, factor)
            queries, keys = (rotate(a, positions, turns, cfg.rope_layout, size) for a in (queries, keys))

        key_positions, window = positions, self.layer.window
        if use_kv_cache:
            if self.cache is not None:
                old_keys, old_values, old_positions = self.cache
                keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
                key_positions = torch.cat([old_positions, positions])
            latest = slice(-cfg.max_seq_len, None)
            self.cache = keys[:, :, latest], values[:, :, latest], key_positions[latest]
            window = cfg.max_seq_len if window is None else min(window, cfg.max_seq_len)

        scores = self._scores(queries, keys.repeat_interleave(groups, dim=1))
        if cfg.kv_sharing == "summed_scores":
            scores = scores.unflatten(1, (sizes.num_kv_heads, groups)).sum(dim=2)
        else:
            values = values.repeat_interleave(groups, dim=1)
        scores = softcap(scores, cfg.attention_softcap)
        if mask is None:
            behind = positions[:, None] - key_positions[None, :]
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            if documents is not None:
                seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
            scores = scores.masked_fill(~seen, -math.inf)
        else:
            scores = scores + mask
        weights = functional.dropout(self.softmax(scores), cfg.attention_dropout, self.training)
        out = (weights.to(values.dtype) @ values).transpose(1, 2).reshape(batch, length, -1)
        return self.out(out) if cfg.attention_out_proj else out

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores queries [B, N, T, H] against keys [B, N, S, H]: [B, N, T, S], in at least float32."""
        cfg = self.cfg
        scale = 1 / math.sqrt(cfg.resolved.head_dim) if cfg.attention_scale is None else cfg.attention_scale
        if cfg.attention_score == "dot":
            return widened(queries) @ widened(keys).transpose(2, 3) * scale
        if cfg.attention_score == "multiplicative":
            projected = queries @ self.score_weight.to(queries.dtype).transpose(1, 2)
            return widened(projected) @ widened(keys).transpose(2, 3) * scale
        key_weight, query_weight = (w.to(queries.dtype) for w in (self.score_key, self.score_query))
        if cfg.attention_score == "concat":
            of_keys = widened(keys) @ widened(key_weight)[:, :, None]
            of_queries = widened(queries) @ widened(query_weight)[:, :, None]
            return of_keys.transpose(2, 3) + of_queries
        hidden = torch.tanh((keys @ key_weight)[:, :, None, :, :] + (queries @ query_weight)[:, :, :, None, :])
        out = widened(self.score_out.to(queries.dtype))
        return (widened(hidden) * out[:, None, None, :]).sum(dim=-1)


class Attention:
    """One head, Xnew = softmax(Q K^T / sqrt(D_k)) V, with its derivative written by hand (CMU 11-785).

    Args:
      weights_keys, weights_queries: [D, D_k].
      weights_values: [D, D_v].
      causal: token t sees only tokens 0 to t.

    `forward` stores K, Q, V, A_w (Q K^T, before scaling) and A_sig in the object. `backward` stores the derivatives of
    the loss in these and in the weights: dLdWk, dLdWq, dLdWv (summed over a batch).
    """

    K: Tensor
    Q: Tensor
    V: Tensor
    A_w: Tensor
    A_sig: Tensor
    dLdA_sig: Tensor
    dLdA_w: Tensor
    dLdK: Tensor
    dLdQ: Tensor
    dLdV: Tensor
    dLdWk: Tensor
    dLdWq: Tensor
    dLdWv: Tensor

    def __init__(self, weights_keys: Any, weights_queries: Any, weights_values: Any, causal: bool = False) -> None:
        self.W_k, self.W_q, self.W_v = map(torch.as_tensor, (weights_keys, weights_queries, weights_values))
        self.causal = causal

    def forward(self, X: Any) -> Tensor:
        """Maps X [..., T, D] to Xnew [..., T, D_v]."""
        self.X = torch.as_tensor(X)
        self.K, self.Q, self.V = self.X @ self.W_k, self.X @ self.W_q, self.X @ self.W_v
        self.A_w = self.Q @ self.K.transpose(-1, -2)
        scaled = self.A_w / math.sqrt(self.W_k.shape[1])
        if self.causal:
            scaled = scaled.masked_fill(torch.ones_like(scaled).triu(1).bool(), -math.inf)
        self.A_sig = scaled.softmax(dim=-1)
        return self.A_sig @ self.V

    def backward(self, dLdXnew: Any) -> Tensor:
        """Maps the derivative of a loss in Xnew [..., T, D_v] to the derivative in X [..., T, D]."""
        dLdXnew = torch.as_tensor(dLdXnew)
        self.dLdA_sig = dLdXnew @ self.V.transpose(-1, -2)
        self.dLdV = self.A_sig.transpose(-1, -2) @ dLdXnew
        a = self.A_sig[..., :, None]
        jacobian = torch.diag_embed(self.A_sig) - a @ a.transpose(-1, -2)  # of each row's softmax, [..., T, T, T]
        self.dLdA_w = (jacobian @ self.dLdA_sig[..., :, None])[..., 0] / math.sqrt(self.W_k.shape[1])
        self.dLdQ = self.dLdA_w @ self.K
        self.dLdK = self.dLdA_w.transpose(-1, -2) @ self.Q
        over_batch = list(range(self.X.ndim - 2))
        for name, derivative in (("dLdWk", self.dLdK), ("dLdWq", self.dLdQ), ("dLdWv", self.dLdV)):
            weight = self.X.transpose(-1, -2) @ derivative
            setattr(self, name, weight.sum(dim=over_batch) if over_batch else weight)
        return self.dLdK @ self.W_k.T + self.dLdQ @ self.W_q.T + self.dLdV @ self.W_v.T
