"""Samples one token at a time: with the model's cache, or from the whole history each time."""

import math

import torch
from torch import Tensor

from torchref.model import LanguageModel, Transformer


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_kv_cache: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues prompts [B, T]; returns the new tokens [B, max_new_tokens]. Temperature 0 takes the most likely token.

    Without the cache and past max_seq_len tokens, a model with a learned position table reads the last max_seq_len of
    them. Any other model reads them all, each layer with a window of at most max_seq_len, as with the cache.

    Raises:
      ValueError: with the cache, more tokens than a learned position table has.
    """
    was_training = model.training
    model.eval()
    model.clear_cache()
    history, unread = prompt, prompt
    try:
        for _ in range(max_new_tokens):
            if not use_kv_cache:
                model.clear_cache()
                learned = isinstance(model, Transformer) and model.cfg.position == "learned"
                unread = history[:, -model.cfg.max_seq_len :] if learned else history
            logits = filtered(model(unread, use_kv_cache=True)[:, -1], temperature, top_k, top_p)
            unread = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            history = torch.cat([history, unread], dim=1)
    finally:
        model.clear_cache()
        model.train(was_training)
    return history[:, prompt.shape[1] :]


def filtered(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Divides logits [B, V] by the temperature and sets those of excluded tokens to -inf.

    At temperature 0 only the most likely token stays. top_k keeps the k most likely; of those top_p keeps the smallest
    number of most likely ones whose probabilities add up to p.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    for row in logits:
        order = row.argsort(descending=True)
        if top_k is not None:
            row[order[top_k:]] = -math.inf
        if top_p is not None:
            total, probabilities = 0.0, row.softmax(dim=-1)
            for token in order:
                if total >= top_p:
                    row[token] = -math.inf
                total += float(probabilities[token])
    return logits
