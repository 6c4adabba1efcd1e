"""Cross entropy in nats."""

import torch
from torch import Tensor

from torchref.layers import widened


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of -log softmax(logits)[target] over all tokens; with weights [B, T], the weighted mean.

    Shapes: logits [B, T, V], targets [B, T].
    """
    probabilities = widened(logits).log_softmax(dim=-1)
    losses = -probabilities.gather(-1, targets[..., None])[..., 0]
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    return (losses * weights).sum() / weights.sum()
