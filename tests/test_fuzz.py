"""A few damaged files for every reader; `scripts/fuzz.py` tries as many as one has time for."""

import random
import time

import fuzzing
import hypothesis
import hypothesis.strategies as st
import pytest
from fuzz_mutations import mutate
from fuzz_targets import NEED_TORCH, SLOW, TARGETS

QUICK = [name for name in TARGETS if name not in (*NEED_TORCH, *SLOW)]


def damaged(name):
    """(file, content): one of the target's files, damaged."""
    folder, files = fuzzing.seeds(name)
    seeds = st.sampled_from(files).map(lambda file: (file, (folder / file).read_bytes()))
    return st.tuples(seeds, st.integers(0, 2**32 - 1)).map(
        lambda drawn: (drawn[0][0], mutate(drawn[0][1], random.Random(drawn[1])))
    )


def check(name, examples):
    @hypothesis.settings(max_examples=examples, database=None, derandomize=examples < 100)
    @hypothesis.given(damaged(name))
    def one(case):
        fuzzing.try_bytes(name, *case)

    one()


@pytest.mark.parametrize("name", QUICK)
def test_a_damaged_file_is_read_or_refused(name):
    check(name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_many_damaged_files_are_read_or_refused(name):
    check(name, 60 if name in SLOW else 1000)


def test_the_bounds_are_kept_watch_over(monkeypatch, tmp_path):
    """A reader that raises, takes memory or time, or writes beside its folder is found."""
    config = TARGETS["config"]

    def with_reader(read):
        monkeypatch.setitem(TARGETS, "config", config.__class__(config.make, read, config.damaged))

    fuzzing.seeds("config")
    with_reader(lambda folder: None)
    assert fuzzing.try_bytes("config", "config.json", b"") == "read"
    with_reader(lambda folder: {}["key"])
    with pytest.raises(KeyError):
        fuzzing.try_bytes("config", "config.json", b"")
    with_reader(lambda folder: bytearray(b"x") * (fuzzing.SLACK + (1 << 26)))
    with pytest.raises(fuzzing.FindingError, match="MiB for a file of 0 bytes"):
        fuzzing.try_bytes("config", "config.json", b"")
    with_reader(lambda folder: bytes(1 << 40))
    with pytest.raises(MemoryError):
        fuzzing.try_bytes("config", "config.json", b"")
    with_reader(lambda folder: (folder.parent / "escaped").mkdir())
    with pytest.raises(fuzzing.FindingError, match="wrote 'escaped'"):
        fuzzing.try_bytes("config", "config.json", b"")
    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)

    def endless(folder):
        while True:
            pass

    with_reader(endless)
    with pytest.raises(fuzzing.FindingError, match="took more than 0 s"):
        fuzzing.try_bytes("config", "config.json", b"")
    monkeypatch.setattr(fuzzing, "WAIT", 0.2)
    with_reader(lambda folder: time.sleep(60))
    with pytest.raises(fuzzing.FindingError, match="or waited 0 s"):
        fuzzing.try_bytes("config", "config.json", b"")
