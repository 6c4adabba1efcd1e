"""The scripts that kill training and damage runs, a few rounds each."""

import importlib.util
from pathlib import Path

import pytest

import jaxlm

SCRIPTS = Path(jaxlm.__file__).parent.parent / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_training_ends_bitwise_as_if_left_alone(tmp_path):
    entries = script("soak").soak(6, ["adamw", "adafactor"], 1, tmp_path)
    assert len(entries) == 6
    assert all(entry["same"] for entry in entries), entries
    assert all(entry["arrays"] > 10 for entry in entries)
    fell = {entry["fell"] for entry in entries}
    assert len(fell) >= 2, fell  # so not all of them before training began


@pytest.mark.slow
def test_damages_to_a_run_are_found_or_harmless(tmp_path):
    damage = script("damage")
    entries = damage.damages(damage.Subject(tmp_path), flips=4, truncations=4, others=12, seed=1)
    outcomes = [entry["outcome"] for entry in entries]
    assert len(outcomes) == 20
    assert set(outcomes) <= {"found", "harmless"}, entries
    assert outcomes.count("found") >= 14
