"""What a training step sends over each axis of a mesh, term by term, by formula.

The bytes are those that a device sends in a ring (`jaxlm.analysis.communication.sent_in_a_ring`), so that they compare
with what a compiled program says. The formulas follow XLA's compiler for TPUs (docs/scale.md compares them). Sums of
single numbers, such as the gradient's norm, are left out.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.analysis.communication import sent_in_a_ring
from jaxlm.analysis.mesh_memory import Leaf, MeshShape, device_leaves, ways
from jaxlm.config import ExperimentConfig
from jaxlm.sharding.layout import micro_batch_rows


class Term(NamedTuple):
    """Something that a training step sends."""

    name: str
    axes: str
    """The axes of the mesh, such as "data" or "data+fsdp"."""
    kind: str
    """The collective, such as all-reduce."""
    sent: int
    """Bytes that each device sends in a step, all layers and micro-batches together."""


def step_traffic(config: ExperimentConfig, mesh: MeshShape) -> list[Term]:
    """The terms of a training step that send something; none on one device.

    Raises:
      UserError: the mesh does not divide the batch or a size of the model.
    """
    leaves, rows = device_leaves(config.model, mesh), micro_batch_rows(config.train, mesh)
    times = config.train.grad_accum
    terms = [*_weights(config, leaves, mesh), *_gradients(config, leaves, mesh), *_activations(config, rows, mesh)]
    return [term._replace(sent=term.sent * times) for term in terms if term.sent]


def sent_over(terms: Iterable[Term]) -> dict[str, int]:
    """Bytes that a device sends in a step, by axes."""
    total: Counter[str] = Counter()
    for term in terms:
        total[term.axes] += term.sent
    return dict(total)


def _weights(config: ExperimentConfig, leaves: list[Leaf], mesh: MeshShape) -> list[Term]:
    """The gathers of parameters that fsdp splits: before their products, and again where a layer is computed again."""
    terms = []
    for axes, group in _grouped(leaves).items():
        if not axes:
            continue

        def gathers(leaves: list[Leaf], axes=axes) -> int:
            return sum(sent_in_a_ring("all-gather", leaf.read, ways(axes, mesh)) for leaf in leaves)

        name = "+".join(axes)
        terms.append(Term("parameters, gathered for the forward pass", name, "all-gather", gathers(group)))
        if config.model.remat:
            layers = [leaf for leaf in group if leaf.layers]
            terms.append(Term("parameters, gathered again for the backward pass", name, "all-gather", gathers(layers)))
    return terms


def _gradients(config: ExperimentConfig, leaves: list[Leaf], mesh: MeshShape) -> list[Term]:
    """The sums of gradients over the rows: of parameters that only fsdp splits the rows for, scattered at once.

    A table that is the head, too, has two gradients, summed apart: that of the lookups in its own type, that of the
    head in the type of the product.
    """
    both = "+".join(axis for axis in ("data", "fsdp") if mesh[axis] > 1)
    split = [leaf.read for leaf in leaves if "fsdp" in leaf.axes]
    whole = [leaf.read for leaf in leaves if "fsdp" not in leaf.axes]
    if config.model.tie_embeddings and config.model.family != "bigram":
        sizes = _itemsize(config.model.dtype), _itemsize(config.model.param_dtype)
        head = sum(leaf.read * sizes[0] // sizes[1] for leaf in leaves if leaf.path == "embedding")
        (split if mesh["fsdp"] > 1 else whole).append(head)
    rows = mesh["data"] * mesh["fsdp"]
    if mesh["data"] == 1:
        scattered = sum(sent_in_a_ring("reduce-scatter", size // mesh["fsdp"], mesh["fsdp"]) for size in split)
        kept = Term("gradients, summed and scattered", both, "reduce-scatter", scattered)
    else:  # XLA sums them over all rows at once, then each device takes its part
        summed = sum(sent_in_a_ring("all-reduce", size, rows) for size in split)
        kept = Term("gradients of parameters that fsdp splits, summed", both, "all-reduce", summed)
    summed = sum(sent_in_a_ring("all-reduce", size, rows) for size in whole)
    return [kept, Term("gradients of parameters that fsdp does not split, summed", both, "all-reduce", summed)]


def _activations(config: ExperimentConfig, rows: int, mesh: MeshShape) -> list[Term]:
    """The sums over tensor: of each sublayer's output, of the gradient of its input, of the loss's statistics."""
    cfg, tensor = config.model, mesh["tensor"]
    tokens = rows * cfg.max_seq_len
    width = 0 if cfg.family == "bigram" else cfg.embed_dim

    def summed(name: str, numbers: int, dtype: str) -> Term:
        return Term(name, "tensor", "all-reduce", sent_in_a_ring("all-reduce", numbers * _itemsize(dtype), tensor))

    terms = []
    if cfg.family == "transformer":
        stream, layers = tokens * width, cfg.num_layers
        terms += [summed("output of attention", layers * stream, cfg.dtype)] if cfg.attention_out_proj else []
        terms.append(summed("gradient of the input of attention", layers * stream, cfg.dtype))
        if cfg.resolved.mlp_dim:
            terms.append(summed("output of the MLP", layers * stream, cfg.dtype))
            terms.append(summed("gradient of the input of the MLP", layers * stream, cfg.dtype))
            if cfg.remat and cfg.attention_out_proj and cfg.block_layout == "sequential":  # the MLP reads it
                terms.append(summed("output of attention, computed again", layers * stream, cfg.dtype))
    if cfg.vocab_size % tensor == 0:
        if width:
            terms.append(summed("rows of the embedding table", tokens * width, cfg.dtype))
            terms.append(summed("gradient of the input of the head", tokens * width, cfg.dtype))
        wide = str(np.promote_types(jnp.dtype(cfg.dtype), np.float32))
        terms.append(summed("largest logit, sum and target's logit of each token", 3 * tokens, wide))
    return terms


def _grouped(leaves: list[Leaf]) -> dict[tuple[str, ...], list[Leaf]]:
    groups: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.gathered_over, []).append(leaf)
    return groups


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
