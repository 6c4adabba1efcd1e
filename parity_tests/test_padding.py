"""`jaxlm.parity.padding`: rows of several lengths in one batch are each row alone, for every family."""

import pytest
from cases import SMALL
from planted.checks.padding import check_padding

from jaxlm.config import ModelConfig

WIDE = {**SMALL, "dtype": "float64", "param_dtype": "float64"}
CASES = {
    "learned positions, float32": ModelConfig(num_heads=4, num_kv_heads=2, **SMALL),
    "rope and windows": ModelConfig(num_heads=3, position="rope", window=(3, None), **WIDE),
    "lstm": ModelConfig(family="recurrent", cell="lstm", **WIDE),
    "bigram": ModelConfig(family="bigram", vocab_size=13, max_seq_len=17, dtype="float64", param_dtype="float64"),
    "two places": ModelConfig(num_heads=3, **{**WIDE, "max_seq_len": 2, "num_layers": 1}),
}


FAST = ("rope and windows",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_padded_rows_are_each_row_alone(name):
    report = check_padding(CASES[name])
    assert report.passed, report
    said = {row.name for row in report.rows}
    assert {"a padded batch", "a padded prefill"} <= said
    if name != "two places":
        greedy = {"6 greedy tokens after padded prompts", "6 log-probabilities after padded prompts"}
        assert {"a padded chunk after it", "step 1 after padding", *greedy} <= said
