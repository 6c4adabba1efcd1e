"""How close is equal: two results, each with its rounding, against what float64 gives."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

FLOAT64 = 1e-10
"""The largest max|a - b| / max|b| of equal float64 results."""

FLOAT32 = 1e-5
"""Likewise of float32 ones, where nothing more exact is known."""

ROUNDING, ULPS = 2.0, 4.0
"""Our rounding error, RMS, is at most this many times torch's plus this many units in the last place."""

SINGLE, FAR = 64.0, 1000.0
"""Where our float64 result is not known: the largest error, in units in the last place, that is rounding in any case,
and the RMS error of torch's from which nothing is proven."""

ZERO = 1e-13
"""A tensor this small against the others of its kind is zero in theory: what is there is rounding."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity in both frameworks."""

    quantity: str
    """activation, logits, loss, gradient, update or decoding."""
    name: str
    """Of the layer, parameter or optimizer."""
    shape: tuple[int, ...]
    max_abs: float
    """The largest difference, in the compared precision."""
    max_rel: float
    """The same over the largest absolute value; of an update, over that of the parameter."""
    ulp: float
    """max_rel in units in the last place of the compared precision."""
    our_error: float | None
    """RMS distance of jaxlm's result from the float64 one, over its largest absolute value; None in float64."""
    torch_error: float | None
    """Likewise torch's."""
    float64_rel: float | None
    """max|a - b| / max|b| in float64; None where it was not computed."""
    verdict: Literal["same", "rounding", "DIFFERS"]
    """rounding: equal in float64, but jaxlm's rounding error is more than it may be."""

    @property
    def passed(self) -> bool:
        """Whether nothing but admissible rounding is between the two."""
        return self.verdict == "same"


@dataclasses.dataclass
class Pair:
    """A quantity in both frameworks, in the precision compared, and in float64 (None = not computed)."""

    ours: Any
    theirs: Any
    exact_ours: Any = None
    exact_theirs: Any = None

    def exact(self) -> Any:
        """Our most exact result."""
        return self.ours if self.exact_ours is None else self.exact_ours

    def map(self, function: Callable[[Any], Any]) -> "Pair":
        """The pair of what the function makes of each."""
        sides = (self.ours, self.theirs, self.exact_ours, self.exact_theirs)
        return Pair(*(None if side is None else function(side) for side in sides))


def measure(quantity: str, name: str, pairs: list[Pair], dtype: Any, scale: float = 0.0, unit: float = 0.0) -> Row:
    """Compares a quantity over several draws.

    Args:
      dtype: the type whose units in the last place count: that of the computation, which may be narrower than that of
        the result.
      scale: the size of its kind: a tensor that is ZERO beside it is judged by it, and in float64 a difference of ULPS
        of its last place is rounding.
      unit: the size of what it is a small change of and is rounded with: rounding errors are shares of that.

    The verdict: float64 results agree to FLOAT64 of their largest value; where there are none, those in `dtype` to
    ROUNDING and ULPS of torch's distance from the truth.
    """
    ours, theirs = (_wide([getattr(pair, side) for pair in pairs]) for side in ("ours", "theirs"))
    shape = np.shape(pairs[0].theirs)
    kinds = [np.asarray(side).dtype.name for side in (pairs[0].ours, pairs[0].theirs)]
    if np.shape(pairs[0].ours) != shape or (kinds[0] != kinds[1] and quantity != "decoding"):
        worst = float("inf")
        named = f"{name} {np.shape(pairs[0].ours)} {kinds[0]}, not {kinds[1]}"
        return Row(quantity, named, shape, worst, worst, worst, None, None, worst, "DIFFERS")
    exact = pairs[0].exact_theirs is not None
    truth = _wide([pair.exact_theirs for pair in pairs]) if exact else theirs
    size = _largest(truth)
    if size <= ZERO * scale:
        size = scale
    size = max(size, np.finfo(np.float64).tiny)
    lost = ULPS * np.finfo(np.float64).eps * scale  # what cancels in sums of such values
    unit = max(size, unit)
    eps = float(jnp.finfo(dtype).eps)
    max_abs = _largest(ours - theirs)
    both = pairs[0].exact_ours is not None
    float64_rel = _largest(_wide([pair.exact_ours for pair in pairs]) - truth) / size if exact and both else None
    our_error = torch_error = None
    verdict: Literal["same", "rounding", "DIFFERS"] = "same"
    if exact:
        our_error, torch_error = (float(np.sqrt(np.mean((x - truth) ** 2))) / unit for x in (ours, theirs))
        if not our_error <= ROUNDING * torch_error + ULPS * eps:
            verdict = "rounding" if both else "DIFFERS"
        if not both:  # an RMS hides a single wrong value, and a torch result far from float64 anything
            ours_off, theirs_off = (_largest(x - truth) / unit for x in (ours, theirs))
            if not (ours_off <= max(ROUNDING * theirs_off, SINGLE * eps) and torch_error <= FAR * eps):
                verdict = "DIFFERS"
    elif not max_abs <= (max(FLOAT64 * size, lost) if dtype == "float64" else FLOAT32 * size):
        verdict = "DIFFERS"
    if float64_rel is not None and not float64_rel * size <= max(FLOAT64 * size, lost):
        verdict = "DIFFERS"
    return Row(
        quantity,
        name,
        shape,
        max_abs,
        max_abs / unit,
        max_abs / unit / eps,
        our_error,
        torch_error,
        float64_rel,
        verdict,
    )


def _wide(arrays: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(array).astype(np.float64) for array in arrays])


def _largest(x: np.ndarray) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(np.max(np.abs(x), initial=0))
