"""The loss, and derivatives that are written by hand."""

from jaxlm.model.layers import Dense
from jaxlm.ops import attention, loss
from jaxlm.ops.matmul import _backward
from planted.bugs import edit, later

BUGS = [
    later(
        "loss", "padding counted in the loss",
        "The loss averages over all targets, those of weight 0 too.",
        "model", "padding",
        edit(loss.cross_entropy, "losses.mean() if weights is None", "losses.mean() if True"),
    ),
    later(
        "loss", "loss divided by the rows' length, not the weights",
        "The weighted sum of losses is divided by the number of targets.",
        "model", "divided",
        edit(loss.cross_entropy, "/ weights.sum()", "/ weights.size"),
    ),
    later(
        "gradient", "half of a kernel's gradient",
        "The derivative of a product, written by hand, has a factor of one half.",
        "block_1/mlp/down", "by hand",
        edit(_backward, "jnp.matmul(rows.T, dy_rows)", "0.5 * jnp.matmul(rows.T, dy_rows)"),
    ),
    later(
        "gradient", "softmax derivative without its row sum",
        "The derivative of the softmax, written by hand, lacks its second term.",
        "block_1/attention/key", "by hand",
        edit(attention._read_backward, "weights * (d_weights - row_sum)", "weights * d_weights"),
    ),
    later(
        "gradient", "bias cut off from the loss",
        "The gradient of biases is stopped: they are never trained.",
        "block_1/mlp/down", "stop_gradient",
        edit(Dense.__call__, "expand_dims(bias,", "expand_dims(jax.lax.stop_gradient(bias),"),
    ),
]  # fmt: skip
