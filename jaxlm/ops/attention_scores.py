"""The four attention scores: how well a key matches a query.

Scores are accumulated and returned in at least float32. What multiplicative and additive scores compute before the
last sum has the type of the queries.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxlm.ops import wide_gradients
from jaxlm.ops.matmul import transposed_product, wide_einsum

Score: TypeAlias = Callable[[Array, Array], Array]
"""(queries [B, K, G, T, H], keys [B, K, S, H]) -> scores [B, K, G, T, S]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_scores(
    queries: Float[Array, "B K G T H"], keys: Float[Array, "B K S H"], scale: float | None = None
) -> Float[Array, "B K G T S"]:
    """k^T q times `scale`; None = 1 / sqrt(H). Reverse mode only.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.1.
    """
    wide = _wide(queries)
    if queries.shape[3] == 1:  # one decoding step: with this order of operands XLA:CPU does not copy the cache
        scores = wide_einsum("bksh,bkgth->bkgts", keys, queries, wide)
    else:
        scores = wide_einsum("bkgth,bksh->bkgts", queries, keys, wide)
    return scores * _scale_of(queries, scale)


def _scale_of(queries: Array, scale: float | None) -> float:
    return queries.shape[-1] ** -0.5 if scale is None else scale


def _dot_forward(queries, keys, scale):
    return dot_scores(queries, keys, scale), (queries, keys)


def _dot_backward(scale, residuals, d_scores):
    queries, keys = residuals
    wide = d_scores.dtype
    d_scores = (d_scores * _scale_of(queries, scale)).astype(queries.dtype)
    d_queries = wide_einsum("bkgts,bksh->bkgth", d_scores, keys, wide)
    rows, d_rows = (rearrange(x, "b kv group t width -> b kv (group t) width") for x in (queries, d_scores))
    return d_queries.astype(queries.dtype), transposed_product(d_rows, rows, wide).astype(keys.dtype)


dot_scores.defvjp(_dot_forward, _dot_backward)


def multiplicative_scores(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K S H"],
    weight: Float[Array, "K G H H"],
    scale: float | None = None,
) -> Float[Array, "B K G T S"]:
    """k^T W q times `scale` (None = 1 / sqrt(H)), with one W [key feature, query feature] for each query head.

    Source: Luong et al. 2015 ("general"), https://arxiv.org/abs/1508.04025, here scaled.
    """
    return dot_scores(jnp.einsum("bkgth,kgjh->bkgtj", queries, weight), keys, scale)


def concat_scores(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K S H"],
    key_weight: Float[Array, "K G H"],
    query_weight: Float[Array, "K G H"],
) -> Float[Array, "B K G T S"]:
    """w^T [k; q], with w in two halves. The query's term is equal for all keys, so a softmax without cap cancels it."""
    wide = _wide(queries)
    of_queries = wide_einsum("bkgth,kgh->bkgt", queries, query_weight, wide)
    of_keys = wide_einsum("bksh,kgh->bkgs", keys, key_weight, wide)
    return of_queries[..., :, None] + of_keys[..., None, :]


def additive_scores(
    queries: Float[Array, "B K G T H"],
    keys: Float[Array, "B K S H"],
    key_weight: Float[Array, "K G H A"],
    query_weight: Float[Array, "K G H A"],
    out_weight: Float[Array, "K G A"],
) -> Float[Array, "B K G T S"]:
    """w^T tanh(W [k; q]), with W in two halves and A hidden features a head: A times the memory of the scores.

    Source: Bahdanau et al. 2014, https://arxiv.org/abs/1409.0473, appendix A.1.2.
    """
    wide = _wide(queries)
    of_queries = jnp.einsum("bkgth,kgha->bkgta", queries, query_weight)
    of_keys = jnp.einsum("bksh,kgha->bkgsa", keys, key_weight)
    hidden = jnp.tanh(wide_gradients.add(of_queries[..., :, None, :], of_keys[..., None, :, :]))
    return wide_einsum("bkgtsa,kga->bkgts", hidden, out_weight, wide)


def summed(score: Score) -> Score:
    """The score of a whole group: the sum of its heads' scores, [B, K, 1, T, S]."""
    whole = score.func if isinstance(score, functools.partial) else score
    if whole is dot_scores:  # linear in the query, so adding the queries costs a G-th
        return lambda queries, keys: score(queries.sum(axis=2, keepdims=True), keys)
    return lambda queries, keys: score(queries, keys).sum(axis=2, keepdims=True)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
