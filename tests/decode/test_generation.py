"""Blocks of new tokens, joined."""

import numpy as np

from jaxlm.decode.generation import TokenBlock, join_blocks


def test_blocks_that_end_early_are_filled_up_with_the_stop_token():
    first = TokenBlock(np.array([[1, 2], [3, 7]]), np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    second = TokenBlock(np.array([[7], [7]]), np.array([[-5.0], [0.0]]))
    out = join_blocks([first, second], 5, np.arange(8) == 7)
    assert out.tokens.tolist() == [[1, 2, 7, 7, 7], [3, 7, 7, 7, 7]]
    assert out.log_probs.tolist() == [[-1, -2, -5, 0, 0], [-3, -4, 0, 0, 0]]
    assert out.lengths.tolist() == [2, 1]


def test_each_row_is_filled_up_with_the_stop_token_that_ended_it():
    block = TokenBlock(np.array([[1, 7, 7], [5, 5, 5], [1, 2, 5]]), np.zeros((3, 3)))
    out = join_blocks([block], 4, np.isin(np.arange(8), [5, 7]))
    assert out.tokens.tolist() == [[1, 7, 7, 7], [5, 5, 5, 5], [1, 2, 5, 5]]
    assert out.lengths.tolist() == [1, 0, 2]


def test_without_a_stop_token_every_length_is_that_of_the_tokens():
    out = join_blocks(iter([TokenBlock(np.array([[1, 2, 3]]), np.zeros((1, 3)))]), 3, np.zeros(8, bool))
    assert out.lengths.tolist() == [3]
