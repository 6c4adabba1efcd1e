"""Models that score texts: a run, and which folders are refused."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from held_out import log_probs_of, row_of
from tolerances import FLOAT32

from jaxlm.decode.score import score
from jaxlm.errors import UserError
from jaxlm.evals.scorers import RunScorer, batches, load_scorer


def test_an_oracle_names_what_it_cannot_read(trained):
    scorer = RunScorer(trained, 8)
    with pytest.raises(ValueError, match=r"oracle .*tiny-1: characters 'é' are outside the vocabulary"):
        scorer(["CAFé"])
    log_probs, tokens = scorer(["NO", "YES WE CAN", "A"])
    assert tokens.tolist() == [3, 11, 2]
    for text, log_prob in zip(["NO", "YES WE CAN", "A"], log_probs, strict=True):
        expected = log_probs_of(trained, row_of(text, trained.tokenizer)).sum()
        np.testing.assert_allclose(log_prob, expected, rtol=100 * FLOAT32)


def test_a_folder_that_is_no_oracle_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a run nor a Hugging Face folder"):
        load_scorer(tmp_path, 8)
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(ValueError, match=r"is neither a run nor a Hugging Face folder"):
        load_scorer(tmp_path, 8)


def test_a_hugging_face_model_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"for which torch is missing: pip install 'jaxlm\[parity\]'"):
        load_scorer(tmp_path, 8)


def test_rows_end_where_a_learned_table_does(text_run):
    learned = dataclasses.replace(text_run.config.model, position="learned", max_seq_len=48)
    table = 0.1 * jax.random.normal(jax.random.key(0), (48, learned.embed_dim))
    params = {**text_run.params, "position_embedding": table}
    short = dataclasses.replace(text_run, model=text_run.model.clone(cfg=learned), params=params)
    words = (
        r"oracle .*: 69 tokens are beyond .* max_seq_len = 48: use a model with a longer table, or .* other positions"
    )
    with pytest.raises(UserError, match=words):
        RunScorer(short, 8)(["A" * 70])
    log_probs, _ = RunScorer(short, 8)(["A" * 49])  # padded to a power of two, it would not fit
    expected = score(short.model, short.params, short.tokenizer.encode("A" * 49)[None])
    np.testing.assert_allclose(log_probs, expected, rtol=100 * FLOAT32)


def test_the_last_batch_is_filled_up_with_the_last_row():
    assert [(rows.tolist(), real) for rows, real in batches(5, 2)] == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]
    assert [(rows.tolist(), real) for rows, real in batches(2, 64)] == [([0, 1], 2)]
