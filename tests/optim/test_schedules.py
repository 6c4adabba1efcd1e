"""Learning-rate schedules."""

import numpy as np
import pytest

from jaxlm.config import OptimConfig
from jaxlm.optim import build_schedule


def rates(steps, **fields):
    schedule = build_schedule(OptimConfig(learning_rate=2.0, **fields), steps)
    return np.array([float(schedule(t)) for t in range(steps + 1)])


def test_warm_up_is_linear_never_zero_and_reaches_the_peak():
    for name in ("cosine", "linear", "wsd", "constant", "rsqrt"):
        np.testing.assert_allclose(rates(20, schedule=name, warmup_steps=4)[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


def test_cosine_ends_at_its_share_of_the_peak():
    values = rates(20, warmup_steps=4, min_lr_ratio=0.1)
    np.testing.assert_allclose(values[12], 0.2 + 0.5 * 1.8, rtol=1e-6)
    np.testing.assert_allclose(values[20], 0.2, rtol=1e-6)
    assert (np.diff(values[4:]) < 0).all()


def test_linear_falls_from_the_peak_to_its_share_of_it():
    values = rates(20, schedule="linear", warmup_steps=4, min_lr_ratio=0.1)
    np.testing.assert_allclose(values[[4, 12, 20]], [2.0, 1.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(np.diff(values[4:]), -1.8 / 16, rtol=1e-5)


def test_wsd_keeps_the_peak_and_falls_over_the_last_share_of_the_steps():
    values = rates(20, schedule="wsd", warmup_steps=4, min_lr_ratio=0.1, decay_share=0.4)
    np.testing.assert_allclose(values[4:13], 2.0, rtol=1e-6)
    np.testing.assert_allclose(values[12:], np.linspace(2.0, 0.2, 9), rtol=1e-6)
    np.testing.assert_allclose(rates(20, schedule="wsd", warmup_steps=0, decay_share=1.0, min_lr_ratio=0.0)[10], 1.0)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_decay_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"decay_share = .* is out of range: give 0 < decay_share <= 1"):
        OptimConfig(schedule="wsd", decay_share=share)


def test_a_decay_that_no_schedule_reads_or_that_begins_in_the_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"decay_share = 0.3 is not read by schedule = 'cosine'"):
        OptimConfig(decay_share=0.3)
    with pytest.raises(
        ValueError, match="decay_share = 0.9 of steps = 20 begins at step 2, before the warm-up of .* 4"
    ):
        rates(20, schedule="wsd", warmup_steps=4, decay_share=0.9)


def test_constant_and_rsqrt_after_the_warm_up():
    np.testing.assert_allclose(rates(20, schedule="constant", warmup_steps=4)[4:], 2.0)
    np.testing.assert_allclose(rates(20, schedule="rsqrt", warmup_steps=4)[19], 2.0 * np.sqrt(5 / 20), rtol=1e-6)
    np.testing.assert_allclose(rates(20, schedule="constant", warmup_steps=0), 2.0)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps = 20 is not below steps = 20: .* --optim.warmup-steps"):
        rates(20, warmup_steps=20)
