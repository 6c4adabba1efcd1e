"""How close is equal. Float64 separates rounding from a wrong formula."""

import numpy as np

FLOAT64 = 1e-10
FLOAT32 = 1e-5
OPTAX_ADAFACTOR = 1e-8
"""In float64 too: optax.adafactor computes its decay rate in float32, which shifts parameters this little."""
OPTAX_ADAFACTOR_STEP = 1e-7
"""The same for the steps alone."""


def assert_close(ours, reference, tolerance: float) -> None:
    """max |a - b| / max |reference| is at most `tolerance`, and nothing is NaN."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"shape {ours.shape} against {reference.shape}"
    error = np.max(np.abs(ours - reference), initial=0) / max(np.max(np.abs(reference), initial=0), 1e-300)
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.0e}"


def assert_float32_as_good(ours, theirs, truth) -> None:
    """Our float32 error, RMS over all given, is at most twice theirs plus 4 ulp of the scale of the float64 truth."""
    truth = np.asarray(truth)
    assert truth.dtype == np.float64
    assert np.asarray(ours).dtype == np.asarray(theirs).dtype == np.float32
    our_error, their_error = (np.sqrt(np.mean(np.square(np.asarray(x, np.float64) - truth))) for x in (ours, theirs))
    ulp = np.finfo(np.float32).eps * np.max(np.abs(truth))
    assert our_error <= 2 * their_error + 4 * ulp, f"{our_error / ulp:.2f} ulp against {their_error / ulp:.2f} ulp"
