"""How close is equal. Float64 separates rounding from a wrong formula."""

import numpy as np

FLOAT64 = 1e-10
FLOAT32 = 1e-5


def assert_close(ours, reference, tolerance: float) -> None:
    """max |a - b| / max |reference| is at most `tolerance`, and nothing is NaN."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"shape {ours.shape} against {reference.shape}"
    error = np.max(np.abs(ours - reference), initial=0) / max(np.max(np.abs(reference), initial=0), 1e-300)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"
