"""Whole models against torchref with the same weights: layers, logits, loss, gradients, updates, cached decoding."""

import dataclasses

import cases
import pytest

from jaxlm import parity


def assert_same(cfg, parts=("gradients", "decoding", "sampling"), draws=None):
    """Asserts that a config passes; returns the report."""
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


ROUNDED = {0, 1, 4, 12, len(cases.ROWS)}
"""The cases compared in float32 and by greedy tokens too; the others in float64 only, but in full when slow."""
QUICK = {0, 3, 6, 11, 12, 24, len(cases.ROWS), len(cases.ROWS) + 3}
"""The others wait for the slow tests, which compare all cases in full."""


def test_the_quick_cases_have_every_value_of_attention_and_a_recurrent_network():
    quick = [cases.CASES[i] for i in QUICK]
    for name, values in cases.PAIRED.items():
        assert {getattr(cfg, name) for cfg in quick if cfg.family == "transformer"} == set(values), name
    assert {"bigram", "recurrent", "transformer"} <= {cfg.family for cfg in quick}
    assert {True, False} == {cfg.scan_layers for cfg in quick}


def case(i):
    return pytest.param(i, marks=() if i in QUICK else pytest.mark.slow, id=named(cases.CASES[i]))


@pytest.mark.parametrize("i", [case(i) for i in range(len(cases.CASES))])
def test_models_are_those_of_torch(i):
    cfg, parts = cases.CASES[i], ("gradients", "decoding", "sampling")
    if i not in ROUNDED:
        cfg, parts = dataclasses.replace(cfg, dtype="float64", param_dtype="float64"), parts[:2]
    rows = assert_same(cfg, parts).rows
    wanted = {"logits", "loss", "gradient", "decoding"} | ({"activation"} if cfg.family != "bigram" else set())
    assert {row.quantity for row in rows} == wanted
    assert ("12 greedy tokens" in {row.name for row in rows}) == (i in ROUNDED and not cfg.has_position_table)
    exact = [row.float64_rel if i in ROUNDED else row.max_rel for row in rows]
    assert sum(error is None for error in exact) <= 4  # greedy tokens, and what is scanned or recomputed
    assert max(error for error in exact if error is not None) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("cfg", cases.CASES, ids=named)
def test_models_are_those_of_torch_in_full(cfg):
    assert_same(cfg, ("gradients", "updates", "decoding", "sampling"))
