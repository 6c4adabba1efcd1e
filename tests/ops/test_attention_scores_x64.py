"""The four attention scores against their formulas."""

import itertools

import numpy as np
import pytest
from gradients import normal
from tolerances import FLOAT64, assert_close

from jaxlm.ops.attention_scores import additive_scores, concat_scores, dot_scores, multiplicative_scores, summed

pytestmark = pytest.mark.x64


def each_pair(queries, keys):
    """(b, k, g, t, s, query vector, key vector) of grouped queries and keys."""
    for b, k, g, t, s in itertools.product(*map(range, (*queries.shape[:4], keys.shape[2]))):
        yield (b, k, g, t, s), queries[b, k, g, t], keys[b, k, s]


def test_scores_follow_their_formulas():
    queries, keys = normal(0, 2, 2, 3, 3, 5), normal(1, 2, 2, 4, 5)
    square, key_w, query_w = normal(2, 2, 3, 5, 5), normal(3, 2, 3, 5), normal(4, 2, 3, 5)
    key_a, query_a, out_a = normal(5, 2, 3, 5, 7), normal(6, 2, 3, 5, 7), normal(7, 2, 3, 7)
    made = {
        "dot": dot_scores(queries, keys),
        "multiplicative": multiplicative_scores(queries, keys, square),
        "concat": concat_scores(queries, keys, key_w, query_w),
        "additive": additive_scores(queries, keys, key_a, query_a, out_a),
    }
    expected = {name: np.zeros((2, 2, 3, 3, 4)) for name in made}
    for place, q, key in each_pair(np.asarray(queries), np.asarray(keys)):
        head, both = place[1:3], np.concatenate([key, q])
        weight = np.concatenate([key_a[head], query_a[head]])  # [2 H, A]
        expected["dot"][place] = key @ q / np.sqrt(5)
        expected["multiplicative"][place] = key @ np.asarray(square[head]) @ q / np.sqrt(5)
        expected["concat"][place] = np.concatenate([key_w[head], query_w[head]]) @ both
        expected["additive"][place] = np.asarray(out_a[head]) @ np.tanh(weight.T @ both)
    for name, scores in made.items():
        assert_close(scores, expected[name], FLOAT64)
    assert_close(summed(dot_scores)(queries, keys), made["dot"].sum(axis=2, keepdims=True), FLOAT64)
