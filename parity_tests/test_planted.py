"""A bug planted in the source must be caught by the comparison with PyTorch, and named."""

import mutations
import planting
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_caught_and_named(mutation):
    sound = planting.sound(mutation.case)
    assert sound.passed, f"without the bug\n{sound}"
    report = planting.run(mutation)
    assert planting.missed(mutation, report) == [], f"what is missing in\n{report}"


def test_every_bug_can_be_planted():
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(set(names)) == len(names) >= 24
    for mutation in mutations.MUTATIONS:
        for edit in mutation.edits:
            edit.code()
