"""The line with which a training starts."""

import dataclasses

import numpy as np
import pytest

from jaxlm.analysis.expected import StepCost
from jaxlm.config import DataConfig
from jaxlm.config.presets import preset
from jaxlm.data.batches import PaddedRows
from jaxlm.run import start_line
from jaxlm.run.session import new_session


def test_it_says_on_what_of_what_for_how_long_and_what_it_takes(monkeypatch, tmp_path, shakespeare):
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:20_000])
    tiny, out = preset("tiny"), tmp_path / "run"
    model = dataclasses.replace(tiny.model, num_layers=1, embed_dim=8)
    config = dataclasses.replace(tiny, data=DataConfig(path=str(tmp_path / "text.txt")), model=model)
    session = new_session(config, out)
    known = dataclasses.replace(session, cost=StepCost(10**9, 4 * 10**8, 10**8, 8, 1.0))
    monkeypatch.setattr(start_line, "_kind", lambda: "TPU v9")
    monkeypatch.setattr(start_line, "free_memory", lambda: 8 * 10**9)
    parameters = 8 * (session.config.model.vocab_size + 32 + 12 * 8 + 3)  # tables, a block, three norms
    start = f"{out}: 1 x TPU v9, {parameters:,} parameters, 18,000 training tokens, 70 batches an epoch, 7.11 epochs"
    assert start_line.start_line(known) == f"{start} in 500 steps, about 1.5 GB of memory (8.0 GB free)"
    monkeypatch.setattr(start_line, "free_memory", lambda: None)
    resumed = dataclasses.replace(known, saved_step=250)
    assert start_line.start_line(resumed) == f"{start} in 500 steps from step 250, about 1.5 GB of memory"
    rows = PaddedRows(np.array([[1, 2, 3, 0], [1, 2, 0, 0]]), 0)
    resumed = dataclasses.replace(known, corpus=dataclasses.replace(session.corpus, train=rows))
    assert " parameters, 3 training targets, 0.25 batches an epoch, " in start_line.start_line(resumed)


@pytest.mark.parametrize(
    ("number", "text"), [(0.00123, "0.0012"), (0.1, "0.10"), (9.99, "9.99"), (12.6, "13"), (3921.3, "3,921")]
)
def test_numbers_have_two_digits(number, text):
    assert start_line._short(number) == text
