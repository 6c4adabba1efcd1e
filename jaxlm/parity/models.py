"""A model with the same weights in jaxlm and torchref: everything both compute, and where they first diverge."""

import dataclasses
import os
from collections.abc import Collection
from typing import Literal, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.parity.comparison import MORE, Comparison
from jaxlm.parity.decoding import compare_decoding, compare_greedy
from jaxlm.parity.forward import compare_gradients, compare_layers
from jaxlm.parity.inputs import Batches
from jaxlm.parity.networks import Reference, TorchNetwork, computing
from jaxlm.parity.padding import compare_padding
from jaxlm.parity.positions import compare_positions
from jaxlm.parity.report import Report, joined
from jaxlm.parity.softmax import compare_softmax
from jaxlm.parity.source import Source, open_source
from jaxlm.parity.updates import compare_updates
from jaxlm.types import Params

Part = Literal["gradients", "updates", "decoding", "sampling", "positions", "padding"]
"""What is compared besides activations, logits and losses; sampling is greedy, positions are long contexts, and padding
is rows of several lengths in one batch."""

SourcePart = Literal["gradients", "decoding", "sampling", "positions"]
"""The same where the other side is another library's model."""

LARGE = 2**26
"""Parameters above which a single row is read, and one batch: gradients and activations have billions of bytes."""


def check(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray | None = None,
    *,
    prompt: np.ndarray | None = None,
    seed: int = 0,
    draws: int | None = None,
    parts: Collection[str] = get_args(Part),
) -> Report:
    """Compares `jaxlm.build_model(cfg)` with `torchref.build_model(cfg)` under the same parameters.

    It compares the output of every layer, the logits, the loss (with weights), the gradient of every parameter, three
    steps of each optimizer from identical gradients, cached decoding past the wrap of its window, greedy tokens, rows
    of several lengths in one batch, and the logits of one row each of 512 and 2,048 tokens, as far as the context goes,
    and of the last 64 positions beyond that. Products are taken at the highest precision.

    Float64 decides what is a bug: there only another formula differs by more than 1e-10 of a tensor's largest value.
    The report then names the first layer to differ, with likely causes, tried where they can be. In the config's own
    type JAX's rounding error may be twice torch's plus 4 units in the last place (a quarter of one for bfloat16, whose
    softmax must also round as torch's does). Where only rounding fails, more random batches are read before it counts.

    Args:
      tokens: token ids to read [B, T + 1], T >= 2; None = random ones, as many as the context or 131 and three windows,
        in 3 rows (1 for a model of more than 67 million parameters), or for bfloat16 in as many as 4,096 tokens need:
        sums over fewer hide that they are kept in bfloat16.
      prompt: ids [B, P] that greedy sampling continues; None = the first half of the tokens.
      seed: of the random tokens and of the weights of the loss.
      draws: random batches over which rounding errors are averaged; None = 3, or 1 for bfloat16. Unused with tokens.

    Raises:
      UserError: parameters that do not fit the config; tokens or a prompt that it cannot read.
    """
    return _compared(cfg, params, TorchNetwork, tokens, prompt, seed, draws, parts)


def check_import(
    path: str | os.PathLike[str] | Source,
    reference: str = "hf",
    *,
    tokens: np.ndarray | None = None,
    prompt: np.ndarray | None = None,
    seed: int = 0,
    draws: int | None = None,
    parts: Collection[str] = get_args(SourcePart),
) -> Report:
    """Compares what `jaxlm.convert` makes of a foreign model with the model in its own library, as `check` does.

    The other side is transformers' module (eager attention, local files only) or the user's GPT class of nanoGPT. It
    compares the output of every layer that has a counterpart, the logits, the loss that the source computes, the
    gradient of every parameter, cached decoding past every window, long contexts and 64 greedy tokens. nanoGPT has no
    cache: there decoding is compared with the whole forward pass. Weights in bfloat16 or float16 are compared in
    float32. In float64 the formulas of transformers are computed in float64 throughout, also those that it computes
    in float32 in a model of any type.

    Args:
      path: a folder that save_pretrained wrote, or for "nanogpt" one with ckpt.pt and its model.py, whose code runs;
        or what `open_source` made of it.
      reference: "hf" or "nanogpt".

    Raises:
      UserError: what `check` and `open_source` raise.
    """
    source = path if isinstance(path, Source) else open_source(path, reference)
    return _compared(source.cfg, source.params, source.network, tokens, prompt, seed, draws, parts)


def _compared(
    cfg: ModelConfig,
    params: Params,
    reference: Reference,
    tokens: np.ndarray | None,
    prompt: np.ndarray | None,
    seed: int,
    draws: int | None,
    parts: Collection[str],
) -> Report:
    known = get_args(Part) if reference is TorchNetwork else get_args(SourcePart)
    if not {*parts} <= {*known}:
        raise UserError(f"parts = {tuple(parts)!r} has an unknown one: choose among {', '.join(known)}")
    if draws is not None and draws < 1:
        raise UserError(f"draws = {draws} is too small: give at least 1")
    if prompt is not None and (prompt.ndim != 2 or not prompt.size):
        raise UserError(f"prompt of shape {list(prompt.shape)} cannot be continued: give rows of ids, [B, P]")
    for path, leaf in flatten_dict(params, sep="/").items():
        if not np.isfinite(np.asarray(leaf, np.float64)).all():
            raise UserError(f"parameter {path} is not finite: a model with NaN or infinity cannot be compared")
    if prompt is not None:  # and a token that continues it
        cfg.check_reach(prompt.shape[1] + 1, "give a shorter prompt")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    batches = Batches(cfg, tokens, seed, draws, short=numbers > LARGE)
    # The updates have gradients of their own.
    comparison = Comparison(cfg, params, batches, "gradients" in parts, reference)
    # In the order of computation: what comes later is only right if what comes before is.
    results = [comparison.settled(compare_layers), compare_softmax(comparison)]
    if "positions" in parts:
        results.append(comparison.settled(compare_positions, start=1, more=MORE[:2]))
    if "gradients" in parts:
        results.append(comparison.settled(compare_gradients))
    if "updates" in parts:
        results.append(comparison.settled(compare_updates, start=1))
    if "decoding" in parts:
        results.append(comparison.settled(compare_decoding))
    if "sampling" in parts:
        results.append(compare_greedy(comparison, prompt))
    if "padding" in parts and numbers <= LARGE:
        results.append(compare_padding(comparison))
    return joined(results)


def random_params(cfg: ModelConfig, seed: int = 0) -> Params:
    """Random parameters under which every part of a model matters: even biases and norm scales are not constant."""
    with computing(cfg.dtype):
        params = init_params(build_model(dataclasses.replace(cfg, init="torch")), jax.random.key(seed))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))

        def varied(leaf: jax.Array, key: jax.Array) -> jax.Array:
            return leaf if leaf.std() > 0 else leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)

        return jax.tree.unflatten(tree, [varied(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])
