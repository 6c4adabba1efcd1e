"""How close is equal: two results, each with its rounding error, against what float64 gives."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

FLOAT64 = 1e-10
"""The largest max|a - b| / max|b| of equal float64 results."""

FLOAT32 = 1e-5
"""The same for float32 results, where nothing more exact is known."""

ROUNDING, ULPS = 2.0, 4.0
"""JAX's rounding error (RMS) is at most this many times torch's, plus this many units in the last place (ULP)."""

BFLOAT16_ULPS = 0.25
"""ULPS for bfloat16. Correct rounding of a whole tensor is 0.05 to 0.3 of its ULP (RMS over the largest value), and a
bias gradient summed in bfloat16 over 4,096 tokens is 0.5 to 12: 4 ULP, 3%, would hide most of that."""

SINGLE, FAR = 64.0, 1000.0
"""Used where JAX has no float64 result: the largest single error, in ULP, that still counts as rounding, and the RMS
error of torch's result, in ULP, above which torch's result proves nothing."""

ZERO = 1e-13
"""A tensor this small beside the others of its kind is zero in theory: what it holds is rounding."""

Verdict = Literal["same", "rounding", "DIFFERS"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity in both frameworks."""

    quantity: str
    """compiler, activation, logits, loss, gradient, update or decoding."""
    name: str
    """The name of the layer, parameter or optimizer."""
    shape: tuple[int, ...]
    max_abs: float
    """The largest difference, in the compared precision."""
    max_rel: float
    """max_abs divided by the largest absolute value; for an update, by that of the parameter."""
    ulp: float
    """max_rel in units in the last place of the compared precision."""
    jax_error: float | None
    """RMS distance of JAX's result from the float64 result, divided by the largest absolute value; None in float64."""
    torch_error: float | None
    """The same for torch's result."""
    float64_rel: float | None
    """max|a - b| / max|b| in float64; None where it was not computed."""
    verdict: Verdict
    """rounding: equal in float64, but JAX's rounding error is larger than it may be."""

    @property
    def passed(self) -> bool:
        """Whether the two are the same up to admissible rounding."""
        return self.verdict == "same"


@dataclasses.dataclass(frozen=True)
class Results:
    """One quantity four times: from JAX and torch, in the compared precision and in float64 (None = not computed)."""

    jax: Any
    torch: Any
    jax_float64: Any = None
    torch_float64: Any = None

    @property
    def most_exact_jax(self) -> Any:
        """JAX's float64 result, or the only one it has."""
        return self.jax if self.jax_float64 is None else self.jax_float64

    @property
    def most_exact_torch(self) -> Any:
        """torch's float64 result, or the only one it has."""
        return self.torch if self.torch_float64 is None else self.torch_float64

    def map(self, function: Callable[[Any], Any]) -> "Results":
        """Applies a function to each result that was computed."""
        four = (self.jax, self.torch, self.jax_float64, self.torch_float64)
        return Results(*(None if result is None else function(result) for result in four))


def measure(
    quantity: str, name: str, draws: Sequence[Results], dtype: Any, scale: float = 0.0, unit: float = 0.0
) -> Row:
    """Compares a quantity over several draws of the inputs.

    Args:
      dtype: the type whose units in the last place count: the one computed in, which may be narrower than the type of
        the result.
      scale: the size of the other tensors of its kind. A tensor below ZERO times that is judged by `scale`, and in
        float64 a difference of ULPS units in the last place of `scale` is rounding.
      unit: the size of the tensor that this one is a small change of. Rounding errors are divided by the larger of
        this and the tensor's own size.

    The verdict: float64 results must agree to FLOAT64 of their largest value. If they do, the results in `dtype` are
    held to ROUNDING and ULPS.
    """
    shape = np.shape(draws[0].torch)
    jax_type, torch_type = (np.asarray(result).dtype.name for result in (draws[0].jax, draws[0].torch))
    # Greedy tokens are int32 in JAX and int64 in torch; everything else must have the same type.
    if np.shape(draws[0].jax) != shape or (jax_type != torch_type and quantity != "decoding"):
        worst = float("inf")
        described = f"{name} {np.shape(draws[0].jax)} {jax_type}, not {torch_type}"
        return Row(quantity, described, shape, worst, worst, worst, None, None, worst, "DIFFERS")
    in_jax, in_torch = _wide([draw.jax for draw in draws]), _wide([draw.torch for draw in draws])
    has_truth, has_jax_float64 = draws[0].torch_float64 is not None, draws[0].jax_float64 is not None
    truth = _wide([draw.torch_float64 for draw in draws]) if has_truth else in_torch
    size = _largest(truth)
    if size <= ZERO * scale:
        size = scale
    size = max(size, np.finfo(np.float64).tiny)
    unit = max(size, unit)
    # Float64's own rounding of sums whose terms, of size `scale`, cancel.
    float64_limit = max(FLOAT64 * size, ULPS * np.finfo(np.float64).eps * scale)
    eps = float(jnp.finfo(dtype).eps)
    ulps = BFLOAT16_ULPS if jnp.dtype(dtype) == jnp.bfloat16 else ULPS
    max_abs = _largest(in_jax - in_torch)
    jax_error = torch_error = float64_rel = None
    verdict: Verdict = "same"
    if has_truth:
        jax_error, torch_error = (float(np.sqrt(np.mean((x - truth) ** 2))) / unit for x in (in_jax, in_torch))
        # "not <=" instead of ">", here and below, so that NaN fails.
        if not jax_error <= ROUNDING * torch_error + ulps * eps:
            verdict = "rounding" if has_jax_float64 else "DIFFERS"
        if has_jax_float64:
            float64_rel = _largest(_wide([draw.jax_float64 for draw in draws]) - truth) / size
            if not float64_rel * size <= float64_limit:
                verdict = "DIFFERS"
        else:
            # An RMS hides a single wrong value, and next to a torch result far from float64's everything looks right.
            jax_worst, torch_worst = (_largest(x - truth) / unit for x in (in_jax, in_torch))
            if not (jax_worst <= max(ROUNDING * torch_worst, SINGLE * eps) and torch_error <= FAR * eps):
                verdict = "DIFFERS"
    elif not max_abs <= (float64_limit if dtype == "float64" else FLOAT32 * size):
        verdict = "DIFFERS"
    return Row(
        quantity,
        name,
        shape,
        max_abs,
        max_abs / unit,
        max_abs / unit / eps,
        jax_error,
        torch_error,
        float64_rel,
        verdict,
    )


def _wide(arrays: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(array).astype(np.float64) for array in arrays])


def _largest(x: np.ndarray) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(np.max(np.abs(x), initial=0))
