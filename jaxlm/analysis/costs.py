"""What a model costs, from the shapes in its program alone: nothing is computed and no parameter is made."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.model.cache import init_cache
from jaxlm.model.layers import LanguageModel
from jaxlm.optim import build_optimizer, state_bytes
from jaxlm.training.step import batch_loss
from jaxlm.types import tree_bytes


def parameter_table(cfg: ModelConfig) -> list[tuple[str, tuple[int, ...], int]]:
    """(path, shape, count) of every parameter of a model; block_2 stands before block_10."""
    leaves = jax.tree_util.tree_leaves_with_path(_abstract_params(cfg))
    table = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf.shape, leaf.size) for p, leaf in leaves]
    return sorted(table, key=lambda row: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", row[0])])


def forward_flops_per_token(cfg: ModelConfig) -> float:
    """Floating-point operations of the matrix products of a forward pass over max_seq_len tokens, per token.

    A product of [m, k] and [k, n] counts 2 m k n, including hidden scores as far as they are computed. A
    training step takes about three times as many. Embedding lookups, norms and activations are not counted.
    """
    model, tokens = plain_model(cfg), jax.ShapeDtypeStruct((1, cfg.max_seq_len), jnp.int32)
    program = jax.make_jaxpr(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    return count_product_flops(program(_abstract_params(cfg), tokens).jaxpr) / cfg.max_seq_len


def cache_bytes(cfg: ModelConfig, capacity: int) -> int:
    """Bytes of the cache of one row with room for `capacity` tokens: keys, values and positions, or hidden states."""
    return tree_bytes(jax.eval_shape(lambda: init_cache(cfg, 1, capacity)))


def cache_bytes_per_token(cfg: ModelConfig) -> int:
    """Bytes by which a row's cache grows with each token while no window is full; 0 for families without attention."""
    return cache_bytes(cfg, 2) - cache_bytes(cfg, 1) if cfg.max_seq_len > 1 else 0


def activation_bytes_per_sequence(cfg: ModelConfig) -> int:
    """Bytes that automatic differentiation keeps for the backward pass, for each sequence of max_seq_len tokens.

    An estimate without dropout: XLA may recompute or share some of them, and the backward pass needs room of its own.
    """
    model, params = plain_model(cfg), _abstract_params(cfg)

    def kept(batch: int) -> int:  # the bytes of what the function of the backward pass holds
        windows = jax.ShapeDtypeStruct((batch, cfg.max_seq_len + 1), jnp.int32)
        saved = jax.eval_shape(lambda p, w: jax.vjp(lambda p: batch_loss(p, model, w), p)[1], params, windows)
        return tree_bytes(saved)

    return kept(3) - kept(2)  # leaves out what does not grow with the batch: parameters and masks


COMPARED_OPTIMIZERS = (
    OptimConfig(name="sgd"),
    OptimConfig(name="sgd", arguments=("momentum=0.9",)),
    OptimConfig(name="adamw"),
    OptimConfig(name="adamw", arguments=("mu_dtype=bfloat16",)),
    OptimConfig(name="adamsn"),
    OptimConfig(name="adafactor"),
    OptimConfig(name="adafactor", arguments=("momentum=0.9",)),
)


def optimizer_bytes(cfg: ModelConfig) -> dict[str, int]:
    """Bytes of the state of each of COMPARED_OPTIMIZERS for a model, by name and arguments, such as "adamw"."""
    params = _abstract_params(cfg)
    return {
        " ".join((optim.name, *optim.arguments)): state_bytes(
            build_optimizer(optim, optim.warmup_steps + 1, params), params
        )
        for optim in COMPARED_OPTIMIZERS
    }


def plain_model(cfg: ModelConfig) -> LanguageModel:
    """The model. cuDNN's attention, whose products no program shows, is replaced by another of the same products."""
    plain = dataclasses.replace(cfg, attention_impl="auto") if cfg.attention_impl == "cudnn" else cfg
    return build_model(plain).clone(cfg=plain)


def _abstract_params(cfg: ModelConfig):
    return jax.eval_shape(lambda: init_params(plain_model(cfg), jax.random.key(0)))


def count_product_flops(program: Jaxpr) -> int:
    """2 m k n over every dot_general; the body of a scan as often as it runs, and the costliest branch of a cond."""
    total = 0
    for equation in program.eqns:
        inner = [p for value in equation.params.values() for p in (value if isinstance(value, tuple) else (value,))]
        programs = [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in inner if isinstance(p, ClosedJaxpr | Jaxpr)]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        counts = list(map(count_product_flops, programs))
        total += max(counts, default=0) if equation.primitive.name == "cond" else times * sum(counts)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            total += 2 * math.prod(left.shape[axis] for axis in contracted) * math.prod(result.shape)
    return total
