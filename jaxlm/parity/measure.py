"""How close is equal: two results, each with its rounding error, against what float64 gives."""

import dataclasses
import functools
import math
import operator
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


@dataclasses.dataclass(frozen=True)
class Distances:
    """How far apart the results of one draw are: a few numbers, from which the row of any number of draws follows."""

    shape: tuple[int, ...]
    """Of torch's result."""
    misfit: str
    """Another shape or type of JAX's result, in words; "" if both have the same."""
    numbers: int
    apart: float
    """Largest difference of the two, in the compared precision."""
    largest: float
    """Largest absolute value of the most exact result of torch."""
    squares: tuple[float, float] | None
    """Sums of squared differences of JAX's and of torch's result from torch's in float64; None without that one."""
    worst: tuple[float, float] | None
    """The largest of these differences."""
    float64_apart: float | None
    """Largest difference of the two in float64."""

    def __add__(self, other: "Distances") -> "Distances":
        """The distances of both draws, or of two pieces of one."""

        def both(name: str, join: Any) -> Any:
            one, two = getattr(self, name), getattr(other, name)
            return None if one is None else join(one, two)

        return Distances(
            self.shape,
            self.misfit or other.misfit,
            self.numbers + other.numbers,
            both("apart", _larger),
            both("largest", _larger),
            both("squares", lambda one, two: (one[0] + two[0], one[1] + two[1])),
            both("worst", lambda one, two: (_larger(one[0], two[0]), _larger(one[1], two[1]))),
            both("float64_apart", _larger),
        )

    def of_shape(self, *shape: int) -> "Distances":
        """The same, called by another shape."""
        return dataclasses.replace(self, shape=shape)


def distances(draw: Results) -> Distances:
    """Measures how far the results of one draw are apart."""
    in_jax, in_torch = np.asarray(draw.jax), np.asarray(draw.torch)
    whole = np.issubdtype(in_jax.dtype, np.integer) and np.issubdtype(in_torch.dtype, np.integer)
    # Greedy tokens are int32 in JAX and int64 in torch; everything else must have the same type.
    if in_jax.shape != in_torch.shape or (in_jax.dtype != in_torch.dtype and not whole):
        misfit = f"{in_jax.shape} {in_jax.dtype.name}, not {in_torch.dtype.name}"
        return Distances(in_torch.shape, misfit, 0, math.inf, math.inf, None, None, None)
    truth = None if draw.torch_float64 is None else _wide(draw.torch_float64)
    wide_jax, wide_torch = _wide(in_jax), _wide(in_torch)
    apart = _largest(wide_jax - wide_torch)
    if truth is None:
        return Distances(in_torch.shape, "", in_torch.size, apart, _largest(wide_torch), None, None, None)
    of_jax, of_torch = wide_jax - truth, wide_torch - truth
    squares = float(np.square(of_jax).sum()), float(np.square(of_torch).sum())
    worst = _largest(of_jax), _largest(of_torch)
    float64_apart = None if draw.jax_float64 is None else _largest(_wide(draw.jax_float64) - truth)
    return Distances(in_torch.shape, "", truth.size, apart, _largest(truth), squares, worst, float64_apart)


def measure(
    quantity: str, name: str, draws: Sequence[Results], dtype: Any, scale: float = 0.0, unit: float = 0.0
) -> Row:
    """Compares a quantity over several draws of the inputs; see `judge`."""
    return judge(quantity, name, [distances(draw) for draw in draws], dtype, scale, unit)


def judge(
    quantity: str, name: str, draws: Sequence[Distances], dtype: Any, scale: float = 0.0, unit: float = 0.0
) -> Row:
    """Says what the distances of several draws of the inputs mean.

    Args:
      dtype: the type whose units in the last place count: the one computed in, which may be narrower than the type of
        the result.
      scale: the size of the other tensors of its kind. A tensor below ZERO times that is judged by `scale`, and in
        float64 a difference of ULPS units in the last place of `scale` is rounding.
      unit: the size of the tensor that this one is a small change of. Rounding errors are divided by the larger of
        this and the tensor's own size; in float64, too, ULPS units in the last place of `unit` are rounding.

    The verdict: float64 results must agree to FLOAT64 of their largest value. If they do, the results in `dtype` are
    held to ROUNDING and ULPS.
    """
    all_draws = functools.reduce(operator.add, draws)
    if all_draws.misfit:
        worst = float("inf")
        described = f"{name} {all_draws.misfit}"
        return Row(quantity, described, all_draws.shape, worst, worst, worst, None, None, worst, "DIFFERS")
    size = all_draws.largest
    if size <= ZERO * scale:
        size = scale
    size = max(size, np.finfo(np.float64).tiny)
    unit = max(size, unit)
    # Float64's own rounding of sums whose terms, of size `scale`, cancel, or of what a small change is added to.
    float64_limit = max(FLOAT64 * size, ULPS * np.finfo(np.float64).eps * max(scale, unit))
    eps = float(jnp.finfo(dtype).eps)
    ulps = BFLOAT16_ULPS if jnp.dtype(dtype) == jnp.bfloat16 else ULPS
    jax_error = torch_error = float64_rel = None
    verdict: Verdict = "same"
    if all_draws.squares is not None and all_draws.worst is not None:
        jax_error, torch_error = (math.sqrt(total / max(1, all_draws.numbers)) / unit for total in all_draws.squares)
        # "not <=" instead of ">", here and below, so that NaN fails.
        if not jax_error <= ROUNDING * torch_error + ulps * eps:
            verdict = "DIFFERS" if all_draws.float64_apart is None else "rounding"
        if all_draws.float64_apart is not None:
            float64_rel = all_draws.float64_apart / size
            if not float64_rel * size <= float64_limit:
                verdict = "DIFFERS"
        else:
            # An RMS hides a single wrong value, and next to a torch result far from float64's everything looks right.
            jax_worst, torch_worst = (one / unit for one in all_draws.worst)
            if not (jax_worst <= max(ROUNDING * torch_worst, SINGLE * eps) and torch_error <= FAR * eps):
                verdict = "DIFFERS"
    elif not all_draws.apart <= (float64_limit if dtype == "float64" else FLOAT32 * size):
        verdict = "DIFFERS"
    relative = all_draws.apart / unit
    return Row(
        quantity,
        name,
        all_draws.shape,
        all_draws.apart,
        relative,
        relative / eps,
        jax_error,
        torch_error,
        float64_rel,
        verdict,
    )


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64, copy=False)


def _largest(x: Any) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(np.max(np.abs(x), initial=0))


def _larger(a: float, b: float) -> float:
    """The larger number; NaN if one is."""
    return float(np.maximum(a, b))
