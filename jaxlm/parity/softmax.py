"""The softmax of a bfloat16 model: is it computed in float32, as it must be?

In the output of a layer a softmax kept in bfloat16 hides behind the rounding of queries, keys and values: it raises
that output's error by 5 to 12% only. So the attention weights themselves are compared, from the same queries and keys.
"""

import numpy as np

from jaxlm.parity import causes
from jaxlm.parity.comparison import Comparison
from jaxlm.parity.measure import Row
from jaxlm.parity.networks import computing
from jaxlm.parity.report import Divergence, PartResult

EPS = 2.0**-7
"""The unit in the last place of bfloat16."""

ROUNDING, ULPS = 1.25, 1 / 16
"""JAX's error is at most this many times torch's, plus this many ULP of the weights (all RMS). Measured: a correct
softmax has at most torch's error, one kept in bfloat16 1.6 times torch's with RoPE, whose rotated keys are rounded in
both, and 0.24 ULP or more."""


def compare_softmax(comparison: Comparison) -> PartResult:
    """Compares each layer's attention weights; none of a layer that shows none (a local window, another family).

    torch takes jaxlm's queries and keys, so only the softmax's own rounding and that of the scores are between them.
    """
    each, cfg = comparison.networks.each, comparison.cfg
    if cfg.dtype != "bfloat16" or cfg.family != "transformer":
        return PartResult([], None)
    windows = comparison.batches.first(1)[0].windows
    with computing(cfg.dtype):
        in_jax, values = each.jax.attention_weights(windows)
        in_torch = each.torch.attention_weights(windows, values)
    with computing("float64"):
        truth = each.torch_float64.attention_weights(windows, values)
    rows = [_row(path, in_jax[path], in_torch[path], truth[path]) for path in in_jax]
    failed = next((row for row in rows if not row.passed), None)
    if failed is None:
        return PartResult(rows, None)
    layer = failed.name.removesuffix(" weights")
    where = (
        f"from the same queries and keys its weights have the rounding error {failed.jax_error:.1e}, torch's have "
        f"{failed.torch_error:.1e} (RMS)"
    )
    return PartResult(rows, Divergence("activation", layer, True, where, causes.HINTS["rounding"], "rounding"))


def _row(path: str, in_jax: np.ndarray, in_torch: np.ndarray, truth: np.ndarray) -> Row:
    wide = in_jax.astype(np.float64)
    size = float(np.sqrt(np.mean(truth**2)))
    jax_error, torch_error = (float(np.sqrt(np.mean((x - truth) ** 2))) / size for x in (wide, in_torch))
    worst = float(np.max(np.abs(wide - in_torch)))
    right = jax_error <= ROUNDING * torch_error + ULPS * EPS  # False for NaN
    return Row(
        "activation",
        f"{path} weights",
        truth.shape,
        worst,
        worst / size,
        worst / size / EPS,
        jax_error,
        torch_error,
        None,
        "same" if right else "rounding",
    )
