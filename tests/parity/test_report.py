"""`jaxlm.parity.report`: which divergence is the first, where it is, and what is printed."""

import json

from jaxlm.parity.capture import Event
from jaxlm.parity.measure import Row
from jaxlm.parity.report import Divergence, PartResult, first_divergence, first_failed_row, joined, summary


def row(name, verdict="same", quantity="activation"):
    return Row(quantity, name, (2, 3), 1e-6, 1e-6, 8.0, 1e-6, 2e-7, 1e-15, verdict)


def events(*verdicts):
    """Events of a layer inside a block, in order, with these verdicts."""
    order = [Event("block_0", "in"), Event("block_0/mlp", "in"), Event("block_0/mlp", "out"), Event("block_0", "out")]
    return [(event, row(event.layer, verdict)) for event, verdict in zip(order, verdicts, strict=True)]


def test_a_layer_whose_output_differs_first_is_named():
    event, failed, first = first_divergence("activation", events("same", "same", "DIFFERS", "DIFFERS"))
    assert (event, failed.name) == (Event("block_0/mlp", "out"), "block_0/mlp")
    assert (first.layer, first.inputs_agree, first.verdict) == ("block_0/mlp", True, "DIFFERS")
    assert first.where == "the output of block_0/mlp differs, the input of block_0/mlp agrees"


def test_the_layer_around_is_named_where_an_input_differs_first():
    _, _, first = first_divergence("activation", events("same", "DIFFERS", "DIFFERS", "DIFFERS"))
    assert (first.layer, first.inputs_agree) == ("block_0", True)
    _, _, first = first_divergence("activation", events("DIFFERS", "DIFFERS", "DIFFERS", "DIFFERS"))
    assert first.layer == "embedding"
    assert "nothing before it was captured" in first.where


def test_a_bug_comes_before_rounding_that_was_earlier():
    _, _, first = first_divergence("activation", events("same", "rounding", "DIFFERS", "DIFFERS"))
    assert (first.layer, first.verdict) == ("block_0/mlp", "DIFFERS")
    _, _, first = first_divergence("activation", events("same", "same", "rounding", "same"))
    assert first.verdict == "rounding"
    assert "has the rounding error 1.0e-06, torch's has 2.0e-07 (RMS)" in first.where
    assert first_divergence("activation", events("same", "same", "rounding", "same"), ("DIFFERS",)) is None
    assert first_divergence("activation", events("same", "same", "same", "same")) is None
    assert first_failed_row([row("a", "rounding"), row("b", "DIFFERS")]).where == "activation b differs"
    assert first_failed_row([row("a")]) is None


def test_parts_are_joined_with_a_bug_of_any_part_first():
    rounding = Divergence("activation", "block_0", True, "somewhere", ("narrow",), "rounding")
    bug = Divergence("gradient", "head", True, "elsewhere", ("by hand",))
    layers = PartResult([row("block_0", "rounding")], rounding)
    assert joined([layers, PartResult([row("head", "DIFFERS")], bug)]).first == bug
    report = joined([layers, PartResult([row("head")], None)])
    assert not report.passed
    assert summary(report) == [
        "rounding (float64 agrees), first, activation: block_0; its inputs agree; somewhere",
        "  likely cause: narrow",
    ]
    assert json.loads(json.dumps(report.to_dict()))["first_divergence"]["verdict"] == "rounding"
    assert summary(joined([PartResult([row("head")], None)])) == ["equal up to rounding: 1 quantities"]
