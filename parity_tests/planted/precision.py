"""Formulas that are right but computed too coarsely: float64 does not show them."""

from jaxlm.ops import attention, wide_gradients
from jaxlm.ops.matmul import matmul
from planted.bugs import ROPE, coarse, edit

ATTENTION = "block_0/attention"

BUGS = [
    coarse(
        "activation", "products of 11 bits (TF32)",
        "Products round their factors to 11 bits, as tensor cores do by default.",
        "block_0/attention/query", "TF32",
        edit(matmul, "return wide", 'x = jax.lax.reduce_precision(x, 8, 10) if x.dtype == "float32" else x\n'
             "    return wide"),
    ),
    coarse(
        "activation", "softmax in bfloat16, of a float32 model",
        "The attention weights of a float32 model are computed in bfloat16.",
        ATTENTION, "softmax",
        edit(attention.masked_softmax, "jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)",
             'jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min).astype(scores.dtype '
             'if scores.dtype == "float64" else "bfloat16"), axis=-1).astype(scores.dtype)'),
    ),
    coarse(
        "activation", "softmax in bfloat16, of a bfloat16 model",
        "The attention weights of a bfloat16 model are computed in bfloat16, not in float32.",
        ATTENTION, "softmax",
        edit(attention._read_forward, "masked_softmax(scores, mask)",
             "masked_softmax(scores.astype(values[0].dtype), mask).astype(scores.dtype)"),
        dtype="bfloat16", **ROPE,
    ),
    coarse(
        "gradient", "gradients of biases summed in bfloat16",
        "The gradient of a bias is summed over all tokens in bfloat16.",
        "block_1/attention/value", "long sum",
        edit(wide_gradients.add, "x.dtype == _at_least_float32(x)", "True"), dtype="bfloat16",
    ),
]  # fmt: skip
