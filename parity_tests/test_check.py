"""`jaxlm.parity.check`: what it refuses, and when it stops averaging rounding errors."""

import re

import numpy as np
import pytest
from cases import SMALL
from conversions import random_params

from jaxlm import parity
from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.parity import comparison, measure, models, updates

BIGRAM = ModelConfig(family="bigram", vocab_size=5, max_seq_len=9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"parts": ("gradient",)},
            r"parts = \('gradient',\) has an unknown one: choose among gradients, updates, decoding, sampling",
        ),
        ({"draws": 0}, "draws = 0 is too small"),
        ({"tokens": np.array([1, 2, 3])}, r"tokens \[3\] cannot be compared"),
        ({"tokens": np.zeros((0, 4), int)}, r"tokens \[0, 4\] cannot be compared"),
        ({"tokens": np.full((2, 4), 0.7)}, r"tokens \[2, 4\] cannot be compared"),
        ({"tokens": np.full((2, 4), 5)}, "give 3 or more ids below 5 a row"),
        ({"prompt": np.array([1])}, r"prompt of shape \[1\] cannot be continued"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        parity.check(BIGRAM, random_params(BIGRAM), **arguments)


def test_parameters_that_are_not_finite_are_named():
    params = random_params(BIGRAM)
    with pytest.raises(UserError, match="parameter table is not finite"):
        parity.check(BIGRAM, {"table": params["table"].at[1, 2].set(np.nan)})


def test_a_context_of_one_token_is_refused():
    cfg = ModelConfig(**{**SMALL, "max_seq_len": 1})
    with pytest.raises(UserError, match="max_seq_len = 1 leaves nothing to compare"):
        parity.check(cfg, random_params(cfg))


def test_rounding_is_given_up_after_a_bounded_number_of_batches(monkeypatch):
    monkeypatch.setattr(measure, "ROUNDING", 0.0)
    monkeypatch.setattr(measure, "ULPS", 0.0)
    cfg = ModelConfig(family="embedding_bigram", vocab_size=5, max_seq_len=9, embed_dim=3)
    read = []
    forward = comparison._forward
    monkeypatch.setattr(
        comparison, "_forward", lambda net, batch, with_grads: read.append(batch) or forward(net, batch, with_grads)
    )
    report = parity.check(cfg, random_params(cfg), draws=2, parts=("gradients",))
    assert not report.passed
    assert report.first.causes == (
        "products below float32 (TF32, bfloat16)",
        "softmax or moments narrower than float32",
        "a long sum kept in bfloat16, such as a bias gradient over many tokens",
    )
    assert report.first.verdict == "rounding"
    assert len(read) == 4 * 2 * comparison.MORE[-1]  # four networks
    read.clear()
    assert not parity.check(cfg, random_params(cfg), np.ones((1, 5), int), parts=("gradients",)).passed
    assert len(read) == 4 * comparison.MORE[-1]


@pytest.mark.slow
def test_a_large_model_is_read_in_one_row_and_its_first_layers_updated(monkeypatch):
    monkeypatch.setattr(models, "LARGE", 0)
    named = []
    monkeypatch.setattr(updates, "judge", lambda *of, **how: named.append(of[1]) or measure.judge(*of, **how))
    for window, layers in ((None, {"block_0"}), ((None, 3), {"block_0", "block_1"})):
        cfg = ModelConfig(**{**SMALL, "num_layers": 3, "window": window})
        report = parity.check(cfg, random_params(cfg), parts=("updates",))
        assert report.passed, report
        assert next(row for row in report.rows if row.quantity == "logits").shape[0] == 1
        assert len({row.name.split()[0] for row in report.rows if row.quantity == "update"}) == 5
        assert {part for name in named for part in re.findall(r"block_\d", name)} == layers
        assert any("final_norm" in name for name in named)
        named.clear()
