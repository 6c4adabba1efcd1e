"""A bug planted in the source must be caught by its check, and named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from planted import runner
from planted.bugs import missed
from planted.tables import BUGS, KINDS

NAMES = {bug.name: bug for bug in BUGS}
FAST = [
    "cosine to zero",
    "schedule a step ahead of the optimizer",
    "top-k one too many",
    "repetition penalty that rewards",
    "mask that shows padding",
    "new places in front",
    "heads written as whole projections",
]
"""A few of each kind that `test_given_tokens.py` does not plant."""


def check(bug):
    sound = runner.sound(bug.case)
    assert sound.passed, f"without the bug\n{sound}"
    report = runner.run(bug)
    assert missed(bug, report) == [], f"what is missing in\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught_and_named(bug):
    check(bug)


@pytest.mark.parametrize("name", FAST)
def test_some_of_each_kind_are_caught_and_named(name):
    check(NAMES[name])


def test_every_bug_can_be_planted():
    assert len(NAMES) == len(BUGS) >= 99
    for bug in BUGS:
        assert bug.what.endswith(".")
        assert bug.edits
        for edit in bug.edits:
            with edit.made():
                pass


def test_the_list_is_machine_readable():
    folder = Path(__file__).parent / "planted"
    listed = subprocess.run([sys.executable, folder, "--list", "--json"], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(line["kind"], line["name"]) for line in lines] == [
        (kind, bug.name) for kind, bugs in KINDS.items() for bug in bugs
    ]
    for line in lines:
        assert {"what", "check", "fields", "quantity", "layer", "cause", "cause_is_tried"} <= line.keys()
        assert all(change["old"] != change["new"] for edit in line["edits"] for change in edit["changes"])


class Verdict:
    """What a tool of another project may return."""

    def __init__(self, passed, layer=""):
        self.passed, self.layer, self.causes = passed, layer, ()


@pytest.mark.parametrize("passed", [True, False])
def test_a_tool_that_says_the_same_of_all_code_catches_nothing(passed):
    answer = runner.ask(NAMES["tanh GELU for erf"], {"model": lambda cfg, params: Verdict(passed)})
    assert answer.wrong == ("that there is a bug" if passed else "that sound code passes",)


def test_another_tool_is_asked_with_config_and_parameters():
    import jax.numpy as jnp
    import numpy as np

    import jaxlm

    bug, expected = NAMES["residual sums forgotten"], []

    def tool(cfg, params):
        logits = jaxlm.build_model(cfg).apply({"params": params}, jnp.arange(5)[None])[0]
        expected.append(np.asarray(logits))
        return Verdict(np.allclose(expected[0], expected[-1]), "block_0")

    answer = runner.ask(bug, {"model": tool})
    assert (answer.caught, answer.located, answer.wrong) == (True, True, ())
