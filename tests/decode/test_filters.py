"""The filters and the random choice, against a reference written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import SamplingParams
from jaxlm.decode import filters as filters_module
from jaxlm.decode.filters import FilterFlags, FilterValues, filter_logits, gumbel_noise, penalise, sample_token

KEY = jax.random.key(7)


def of_sampling(vocab_size=11, **filters):
    """(flags, values) of some options."""
    params = SamplingParams(max_new_tokens=1, **filters)
    return FilterFlags.of(params, vocab_size), FilterValues.of(params, vocab_size)


def kept_by(logits, top_k=None, top_p=None, min_p=None):
    """Which entries of one row stay, token by token from the likeliest; ties with the last one kept stay too."""
    kept = np.ones(len(logits), bool)
    if top_k is not None and top_k < len(logits):
        kept &= logits >= np.sort(logits)[-top_k]
    if top_p is not None:
        probs = np.where(kept, np.exp(logits - logits.max()), 0)
        probs /= probs.sum()
        reached, last = 0.0, None
        for token in np.argsort(-logits, kind="stable"):
            if last is not None and reached >= top_p:
                break
            reached, last = reached + probs[token], logits[token]
        kept &= logits >= last
    if min_p is not None:
        kept &= np.exp(logits - logits.max()) >= min_p
    return kept


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.45}, [1, 3]),  # 0.4 alone does not reach it
        ({"top_p": 0.3}, [1]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 0.75}, [0, 1, 3]),
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),  # among the three left the two likeliest have 0.7 / 0.9
        ({"min_p": 0.4}, [0, 1, 3]),  # at least 0.16
        ({"min_p": 0.6, "top_p": 0.95}, [1, 3]),
    ],
)
def test_filters_keep_what_they_say(filters, kept):
    filtered = filter_logits(jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]])), *of_sampling(4, **filters))
    assert np.flatnonzero(np.isfinite(filtered[0])).tolist() == kept


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), list(itertools.product((None, 3, 8), (None, 0.6), (None, 0.2))))
def test_filters_keep_what_the_reference_keeps(top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(size=(40, 11)).astype(np.float32)
    logits[:10] = np.round(logits[:10])  # ties
    filtered = filter_logits(jnp.asarray(logits), *of_sampling(top_k=top_k, top_p=top_p, min_p=min_p))
    expected = [kept_by(row, top_k, top_p, min_p) for row in logits.astype(np.float64)]
    np.testing.assert_array_equal(np.isfinite(filtered), expected)
    np.testing.assert_array_equal(np.asarray(filtered)[expected], logits[expected])


def test_top_p_looks_beyond_its_ceiling_where_it_must(monkeypatch):
    monkeypatch.setattr(filters_module, "TOP_P_CEILING", 4)
    logits = np.random.default_rng(1).normal(size=(6, 11)).astype(np.float32)
    mixed = np.array([0.3, 5, 0.3, 5, 5, 5], np.float32)[:, None]
    for sharpness, within in ((0.3, False), (5.0, True), (mixed, False)):
        rows = sharpness * logits
        expected = np.array([kept_by(row, top_p=0.8) for row in rows.astype(np.float64)])
        assert (expected.sum(axis=1) <= 4).all() == within
        np.testing.assert_array_equal(np.isfinite(filter_logits(jnp.asarray(rows), *of_sampling(top_p=0.8))), expected)


def test_near_values_of_top_k_share_a_program_and_the_ceiling_cuts_nothing():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(5, 40)).astype(np.float32))
    flags, _ = of_sampling(40, top_k=9)
    for top_k in (9, 12, 16):
        same, values = of_sampling(40, top_k=top_k)
        assert same == flags
        assert np.isfinite(filter_logits(logits, flags, values)).sum(axis=1).tolist() == [top_k] * 5


def test_penalty_and_forbidden_tokens():
    logits = jnp.array([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    seen = jnp.array([[True, True, False, False], [False, False, True, True]])
    flags, values = of_sampling(4, repetition_penalty=2.0, forbidden_tokens=(3,))
    expected = [[1.0, -4.0, 1.0, -np.inf], [2.0, -2.0, 0.5, -np.inf]]
    np.testing.assert_allclose(penalise(logits, seen, flags, values), expected)


def test_a_draw_is_that_of_jax_random_categorical_with_the_rows_and_the_steps_key():
    logits = jax.random.normal(KEY, (3, 11))
    row_keys = jax.random.split(jax.random.key(1), 3)
    flags, values = of_sampling(temperature=0.5)
    noise = gumbel_noise(row_keys, jnp.int32(4), 5, 11, jnp.float32)
    for step in range(5):
        for row in range(3):
            key = jax.random.fold_in(row_keys[row], 4 + step)
            expected = jax.random.categorical(key, logits[row] / 0.5)
            assert sample_token(logits, noise[step], None, flags, values)[row] == expected


@pytest.mark.parametrize(
    ("filters", "flags"),
    [
        ({}, {}),
        ({"top_k": 11, "top_p": 1.0}, {}),  # they keep everything
        ({"top_k": 5, "min_p": 0.2}, {"top_k_ceiling": 8, "min_p": True}),
        ({"top_k": 9}, {"top_k_ceiling": 11}),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.2}, {"greedy": True}),
        (
            {"temperature": 0, "repetition_penalty": 1.2, "forbidden_tokens": (3,)},
            {"greedy": True, "repetition_penalty": True, "forbidden": True},
        ),
    ],
    ids=str,
)
def test_only_filters_that_change_something_are_compiled_in(filters, flags):
    assert of_sampling(**filters)[0] == FilterFlags(**flags)


@pytest.mark.parametrize(
    "filters", [{"top_k": 6, "top_p": 0.9}, {"min_p": 0.25}, {"temperature": 2.0, "top_p": 0.7}, {}], ids=str
)
def test_counts_of_draws_follow_the_filtered_distribution(filters):
    count, logits = 40_000, np.random.default_rng(3).normal(size=11)
    flags, values = of_sampling(**filters)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(count))
    noise = gumbel_noise(keys, jnp.int32(0), 1, 11, jnp.float32)[0]
    drawn = sample_token(jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1)), noise, None, flags, values)
    sharp = logits / filters.get("temperature", 1.0)
    only = {name: value for name, value in filters.items() if name != "temperature"}
    probs = np.where(kept_by(sharp, **only), np.exp(sharp), 0)
    probs /= probs.sum()
    counts = np.bincount(drawn, minlength=11)
    assert (counts[probs == 0] == 0).all()
    deviation = np.abs(counts - count * probs) / np.sqrt(count * probs * (1 - probs) + 1e-9)
    assert deviation[probs > 0].max() < 5
