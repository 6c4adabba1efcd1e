"""Every schedule against the schedulers of torch, rate by rate in float64, and the steps that SGD takes with it."""

import pytest
from planted.checks.schedule import check_schedule

from jaxlm.config import OptimConfig


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant", "rsqrt"])
def test_a_schedule_is_that_of_torch(schedule, warmup):
    fields = {"decay_share": 0.3} if schedule == "wsd" else {}
    cfg = OptimConfig(name="sgd", weight_decay=0.0, clip_norm=None, schedule=schedule, warmup_steps=warmup, **fields)
    report = check_schedule(cfg, 20)
    assert report.passed, str(report)
