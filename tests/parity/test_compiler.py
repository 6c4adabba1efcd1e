"""`jaxlm.parity.compiler`: a compiler that computes wrong results."""

from jaxlm.ops import canary
from jaxlm.parity.compiler import compare_compiler


def test_a_wrong_program_is_a_row_and_a_divergence(monkeypatch):
    outcomes = (
        canary.Outcome("layer norm", 2e-7, True),
        canary.Outcome("sums of columns", float("nan"), False),
        canary.Outcome("weight gradient", 0.25, False),
    )
    monkeypatch.setattr(canary, "run_programs", lambda: outcomes)
    rows, first = compare_compiler()
    assert [(row.name, row.verdict) for row in rows] == [
        ("1 of 3 programs", "same"),
        ("sums of columns", "DIFFERS"),
        ("weight gradient", "DIFFERS"),
    ]
    assert {row.quantity for row in rows} == {"compiler"}
    assert (first.quantity, first.layer, first.verdict) == ("compiler", "sums of columns", "DIFFERS")


def test_right_programs_are_one_row(monkeypatch):
    monkeypatch.setattr(canary, "run_programs", lambda: (canary.Outcome("a", 1e-7, True), canary.Outcome("b", 0, True)))
    rows, first = compare_compiler()
    assert first is None
    assert [(row.name, row.max_rel, row.verdict) for row in rows] == [("2 of 2 programs", 1e-7, "same")]
