"""On given tokens, as `jaxlm parity RUN --text` reads them, bugs and coarse computation are caught, rounding is not."""

import dataclasses

import numpy as np
import pytest
from planted import runner
from planted.bugs import missed
from planted.checks.model import check_model
from planted.tables import BUGS

from jaxlm.parity import check, random_params
from jaxlm.parity.comparison import MORE, Comparison

TOKENS = np.random.default_rng(1).integers(0, 13, (1, 15))
# One layer is enough, and compiles in half the time.
PLANTED = {
    bug.name: dataclasses.replace(bug, fields=bug.fields | {"num_layers": 1}) for bug in BUGS if bug.check == "model"
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ring of slots one too short", marks=pytest.mark.slow),
        "a step that does not see its own key",
        "products of 11 bits (TF32)",
        "softmax in bfloat16, of a float32 model",
    ],
)
def test_a_planted_bug_is_caught_and_named_on_given_tokens(name):
    bug = PLANTED[name]
    report = runner.run(bug, tokens=TOKENS)
    assert missed(bug, report) == [], f"what is missing in\n{report}"
    verdicts = {row.verdict for row in report.rows}
    assert bug.verdict in verdicts, report
    assert bug.verdict == "DIFFERS" or "DIFFERS" not in verdicts, report


@pytest.mark.slow
def test_the_same_tokens_without_a_bug():
    """As many as above, and so few that one large rounding error decides an RMS."""
    for tokens in (TOKENS, TOKENS[:, :3]):
        case = PLANTED["ring of slots one too short"].case
        report = check_model(case.subject, **dict(case.options), tokens=tokens)
        assert report.passed, report


@pytest.mark.slow
def test_one_badly_rounded_position_is_settled_by_more_tokens(monkeypatch):
    """What `--text` met: a step of one position whose rounding error is several times torch's by bad luck."""
    cfg = PLANTED["ring of slots one too short"].case.subject
    forward = Comparison.event_rows
    read = []

    def unlucky(self, quantity, values):
        read.append(len(values))
        if quantity == "decoding" and len(values) == 1:
            values = [
                {event: dataclasses.replace(d, squares=(d.numbers * 1e-10, d.squares[1])) for event, d in draw.items()}
                for draw in values
            ]
        return forward(self, quantity, values)

    monkeypatch.setattr(Comparison, "event_rows", unlucky)
    report = check(cfg, random_params(cfg), TOKENS, parts=("decoding",))
    assert report.passed, report
    assert MORE[1] in read
    monkeypatch.setattr("jaxlm.parity.comparison.MORE", (1,))
    report = check(cfg, random_params(cfg), TOKENS, parts=("decoding",))
    assert (report.first.quantity, report.first.verdict) == ("decoding", "rounding")
    assert report.first.causes[0].startswith("products below float32")
    assert any(row.quantity == "decoding" and row.verdict == "rounding" for row in report.rows)
    assert not any("ring" in cause for cause in report.first.causes)
