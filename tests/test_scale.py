"""The plans on docs/scale.md: every number is the command's."""

import runpy
from pathlib import Path

import pytest

import jaxlm

SCRIPT = Path(jaxlm.__file__).parent.parent / "scripts" / "plans.py"


@pytest.mark.parametrize(
    "name", ["gpt2-124m", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt3-xl", "llama-7b"))]
)
def test_the_plans_on_the_page_are_the_numbers_of_the_command(name):
    plans = runpy.run_path(str(SCRIPT))
    assert plans["shown"](name) == plans["table"](name), "python scripts/plans.py"


def test_every_preset_that_is_planned_stands_on_the_page():
    plans = runpy.run_path(str(SCRIPT))
    assert all(
        plans["command"](name, *plan) in plans["shown"](name)
        for name in plans["PLANS"]
        for plan in plans["PLANS"][name]
    )
