"""Whole models against torchref with the same weights: layers, logits, loss, gradients, updates, cached decoding."""

import dataclasses

import cases
import pytest

from jaxlm import parity

SEEDS = 3


def assert_same(cfg, parts=("gradients", "decoding"), draws=SEEDS):
    """The report of a config, after nothing was found in it."""
    report = parity.check(cfg, parity.random_params(cfg), parts=parts, draws=draws)
    assert report.passed, "\n".join(parity.summary(report))
    return report


def test_the_cases_have_every_value_and_every_pair():
    every = [*cases.CASES, *cases.NARROW]
    assert cases.pairs_missing(cases.CASES) == set()
    assert cases.values_missing(every) == {("max_seq_len", None), ("vocab_size", None)}
    assert cases.values_missing(every[:3])
    assert cases.pairs_missing(cases.CASES[:10])


def named(cfg):
    return "-".join(str(getattr(cfg, name)) for name in ("family", "cell", *cases.PAIRED))


ROUNDED = {*range(10), *range(len(cases.ROWS), len(cases.CASES), 2)}
"""The cases whose float32 rounding is compared too; the others are float64 alone, at half the time."""


@pytest.mark.parametrize("i", range(len(cases.CASES)), ids=lambda i: named(cases.CASES[i]))
def test_models_are_those_of_torch(i):
    cfg = cases.CASES[i]
    if i not in ROUNDED:
        cfg = dataclasses.replace(cfg, dtype="float64", param_dtype="float64")
    rows = assert_same(cfg).rows
    wanted = {"activation", "logits", "loss", "gradient", "decoding"} - (
        {"activation"} if cfg.family == "bigram" else set()
    )
    assert {row.quantity for row in rows} == wanted
    exact = [row.float64_rel if i in ROUNDED else row.max_rel for row in rows]
    assert sum(error is None for error in exact) <= 3  # greedy tokens, and what is scanned or recomputed
    assert max(error for error in exact if error is not None) < 1e-12
