"""The compiler: does it compute right at all? If not, no difference further on says anything about the model."""

import numpy as np

from jaxlm.ops import canary
from jaxlm.ops.canary import Outcome
from jaxlm.parity.measure import Row, Verdict
from jaxlm.parity.report import Divergence, PartResult

CAUSE = "this jaxlib miscompiles: install the version in constraints.txt (0.10.2 is known to be wrong on CPU)"


def compare_compiler() -> PartResult:
    """Runs the canary's small programs against NumPy: one row for all that are right, one for each that is wrong."""
    outcomes = canary.run_programs()
    wrong = [outcome for outcome in outcomes if not outcome.right]
    right = [outcome for outcome in outcomes if outcome.right]
    rows = [_row(outcome.name, outcome.error, "DIFFERS") for outcome in wrong]
    if right:
        rows.insert(0, _row(f"{len(right)} of {len(outcomes)} programs", max(one.error for one in right), "same"))
    return PartResult(rows, _divergence(wrong[0]) if wrong else None)


def _divergence(outcome: Outcome) -> Divergence:
    where = f"compiled, this small program is off by {outcome.error:.1e} of its largest value from NumPy in float64"
    return Divergence("compiler", outcome.name, True, where, (CAUSE,))


def _row(name: str, error: float, verdict: Verdict) -> Row:
    ulp = error / float(np.finfo(np.float32).eps)
    return Row("compiler", name, (), error, error, ulp, None, None, None, verdict)
