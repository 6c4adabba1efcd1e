"""Sampling a token at a time: with the model's cache, or from the whole history each time."""

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
    """prompt [B, T] -> the new tokens [B, max_new_tokens]; temperature 0 takes the likeliest.

    Without the cache, past max_seq_len tokens a model with a learned position table reads the latest max_seq_len of
    them; any other reads them all, each layer through a window of at most max_seq_len, as the cache has it.

    Raises:
      ValueError: the cache is to go beyond a learned position table.
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
    """logits [B, V] over the temperature, -inf where a token must not be drawn; at 0 only the likeliest stays.

    top_k keeps the k largest; of those top_p keeps the fewest largest whose probabilities reach p.
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
