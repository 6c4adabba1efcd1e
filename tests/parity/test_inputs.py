"""`jaxlm.parity.inputs`: how much is read, and that more batches come after those given."""

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.parity.inputs import Batches

SMALL = {"vocab_size": 13, "max_seq_len": 16, "num_layers": 2, "embed_dim": 12, "num_heads": 2}


def batches(tokens=None, **fields):
    return Batches(ModelConfig(**{**SMALL, **fields}), tokens, 0, None)


def shape(**fields):
    """(draws, shape of what is read of a batch)."""
    every = batches(**fields)
    return every.draws, every.first(1)[0].weights.shape


def test_random_tokens_fill_the_context_up_to_where_attention_goes_local():
    assert shape() == (3, (3, 16))
    assert shape(max_seq_len=1024) == (3, (3, 131))
    assert shape(max_seq_len=1024, window=(100, None)) == (3, (3, 303))


def test_a_bfloat16_model_reads_thousands_of_tokens():
    assert shape(dtype="bfloat16") == (1, (256, 16))
    assert shape(dtype="bfloat16", max_seq_len=64) == (1, (64, 64))
    assert batches(dtype="bfloat16").decoded_rows == 16
    assert shape(dtype="bfloat16", vocab_size=2**17, max_seq_len=64) == (1, (8, 64))


def test_random_batches_follow_those_given():
    tokens = np.arange(9)[None]
    every = batches(tokens)
    assert (every.draws, every.decoded_rows) == (1, 1)
    assert batches(np.zeros((20, 9), int)).decoded_rows == 20
    first, second, third = every.first(3)
    np.testing.assert_array_equal(first.windows, tokens)
    assert second.windows.shape == third.windows.shape == tokens.shape
    assert (second.windows != third.windows).any()
    assert every.first(2)[1] is second
    assert first.weights.shape == (1, 8)
    assert (first.weights[0, -3:] == 0).all()
    assert (first.weights[0, :-3] > 0).all()
