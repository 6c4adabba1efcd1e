"""`generate` and `predict` in float32: arguments, filters, stopping, rows. test_generate_x64.py has the equalities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CFG, KEY, PROMPT, sampled
from support import apply, built, random_tokens
from tolerances import FLOAT32

from jaxlm.config import ModelConfig
from jaxlm.decode.generate import MAX_BLOCK, _advance, generate, generate_blocks, predict
from jaxlm.decode.prefill import _begin
from jaxlm.decode.request import request_from


def test_same_key_same_tokens_other_key_others():
    assert (sampled(PROMPT).tokens == sampled(PROMPT).tokens).all()
    assert (sampled(PROMPT).tokens != sampled(PROMPT, key=jax.random.key(8)).tokens).any()


def test_samples_of_a_prompt_are_rows_that_differ_and_repeat_with_their_own_keys():
    out = sampled(PROMPT, num_samples=3)
    assert out.tokens.shape == (6, 9)
    assert len({tuple(row) for row in np.asarray(out.tokens)}) == 6
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(6))
    np.testing.assert_array_equal(sampled(PROMPT, num_samples=3, key=keys).tokens, out.tokens)
    np.testing.assert_array_equal(sampled(PROMPT[1:], key=keys[4:5]).tokens[0], out.tokens[4])


def test_log_probs_are_the_models_own_whatever_the_temperature_and_filters():
    model, params = built(CFG)
    out = sampled(PROMPT, temperature=0.5, top_k=4)
    whole = jnp.concatenate([PROMPT, out.tokens], axis=1)
    full = jax.nn.log_softmax(apply(model, params, whole)[0])[:, 4:-1]
    expected = jnp.take_along_axis(full, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.log_probs, expected, atol=10 * FLOAT32)


def test_temperature_zero_is_greedy_and_ignores_the_key():
    model, params = built(CFG)
    out = sampled(PROMPT, temperature=0)
    whole = jnp.concatenate([PROMPT, out.tokens], axis=1)
    np.testing.assert_array_equal(out.tokens, apply(model, params, whole)[0][:, 4:-1].argmax(-1))
    np.testing.assert_array_equal(out.tokens, sampled(PROMPT, temperature=0, key=jax.random.key(1)).tokens)
    np.testing.assert_array_equal(out.tokens, sampled(PROMPT, top_k=1).tokens)


def test_a_finished_row_stays_finished():
    free = np.asarray(sampled(PROMPT, num_samples=4).tokens)
    stop = int(free[0, 3])
    out = sampled(PROMPT, num_samples=4, stop_token=stop)
    for row, unstopped, length, log_probs in zip(out.tokens, free, out.lengths, out.log_probs, strict=True):
        expected = int((unstopped == stop).argmax()) if stop in unstopped else 9
        assert int(length) == expected
        np.testing.assert_array_equal(row[:expected], unstopped[:expected])
        assert (np.asarray(row[expected:]) == stop).all()
        assert (np.asarray(log_probs[expected + 1 :]) == 0).all()
    assert int(out.lengths[0]) <= 3


@pytest.mark.parametrize("several", [list, tuple])
def test_each_of_several_stop_tokens_ends_a_row(several):
    free = np.asarray(sampled(PROMPT, num_samples=4).tokens)
    stops = [int(free[0, 3]), int(free[2, 1])]
    assert stops[0] != stops[1]
    out = sampled(PROMPT, num_samples=4, stop_token=several(stops))
    for row, unstopped, length, log_probs in zip(out.tokens, free, out.lengths, out.log_probs, strict=True):
        places = [place for place, token in enumerate(unstopped) if token in stops]
        expected = min(places, default=9)
        assert int(length) == expected
        np.testing.assert_array_equal(row[: expected + 1], unstopped[: expected + 1])
        assert (np.asarray(row[expected + 1 :]) == unstopped[min(expected, 8)]).all()
        assert (np.asarray(log_probs[expected + 1 :]) == 0).all()
    assert {int(row[-1]) for row, length in zip(out.tokens, out.lengths, strict=True) if length < 9} == set(stops)
    np.testing.assert_array_equal(sampled(PROMPT, num_samples=4, stop_token=several([])).tokens, free)


def test_extremes_still_take_the_likeliest():
    greedy = sampled(PROMPT, temperature=0).tokens
    np.testing.assert_array_equal(sampled(PROMPT, top_p=1e-50).tokens, greedy)
    np.testing.assert_array_equal(sampled(PROMPT, temperature=1e-6).tokens, greedy)
    with pytest.raises(ValueError, match="temperature = 1e-42"):
        sampled(PROMPT, temperature=1e-42)


def test_work_stops_when_every_row_is_done():
    model, params = built(CFG)
    stop = int(sampled(PROMPT[:1], max_new_tokens=1).tokens[0, 0])
    request = request_from(CFG, PROMPT[:1], max_new_tokens=9, key=KEY, stop_token=stop)
    blocks = generate_blocks(model, params, request, 256)
    assert [block.tokens.shape for block in blocks] == [(1, MAX_BLOCK)]
    out = sampled(PROMPT[:1], stop_token=stop)
    assert out.tokens.tolist() == [[stop] * 9]
    assert out.lengths.tolist() == [0]
    assert out.log_probs[0, 0] < 0
    assert (out.log_probs[0, 1:] == 0).all()


def test_programs_are_compiled_per_bucket_never_per_value_or_exact_length():
    def programs():
        return _advance._cache_size(), _begin._cache_size()

    _advance.clear_cache()
    _begin.clear_cache()
    sampled(PROMPT, top_k=3, top_p=0.5, repetition_penalty=1.1)  # 2 prompts of up to 17, 16 slots
    before = programs()
    for length, count, top_k in ((3, 9, 3), (5, 12, 4), (9, 8, 3), (12, 5, 4), (2, 15, 3)):
        tokens = random_tokens(CFG, 2, length, seed=length)
        penalty = 1.0 + length / 10
        sampled(
            tokens, max_new_tokens=count, temperature=length / 5, top_k=top_k, top_p=0.9, repetition_penalty=penalty
        )
    assert programs() == before
    sampled(PROMPT, top_k=3, top_p=0.5, repetition_penalty=1.1, max_new_tokens=13)  # 32 slots
    assert programs() == (before[0] + 1, before[1] + 1)


def test_forbidden_tokens_are_never_generated():
    free = sampled(PROMPT, num_samples=20, temperature=5.0)
    assert {0, 4} < set(np.asarray(free.tokens).ravel().tolist())
    out = sampled(PROMPT, num_samples=20, temperature=5.0, forbidden_tokens=[0, 4])
    assert not {0, 4} & set(np.asarray(out.tokens).ravel().tolist())


def test_the_repetition_penalty_knows_the_prompt_and_the_new_tokens():
    model, params = built(CFG)
    out = sampled(PROMPT, temperature=0, repetition_penalty=1.5)
    whole = np.concatenate([PROMPT, out.tokens], axis=1)
    logits = np.asarray(apply(model, params, whole)[0])
    for row in range(2):
        for place in range(5, 14):
            past = list(set(whole[row, :place].tolist()))
            wanted = logits[row, place - 1].copy()
            wanted[past] = np.where(wanted[past] > 0, wanted[past] / 1.5, wanted[past] * 1.5)
            assert whole[row, place] == wanted.argmax()
    assert (out.tokens != sampled(PROMPT, temperature=0).tokens).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"min_p": 0.0}, "min_p = 0.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"forbidden_tokens": [3, 11]}, "forbidden_tokens holds 11: the vocabulary has 0 to 10"),
        ({"forbidden_tokens": range(11)}, "forbidden_tokens holds all 11 tokens"),
        ({"stop_token": 11}, "stop_token = 11: the vocabulary has 0 to 10"),
        ({"stop_token": [3, 11]}, r"stop_token = \(3, 11\): the vocabulary has 0 to 10"),
        ({"stop_token": [3, -1]}, r"stop_token = \(3, -1\) is negative: give ids from 0 on"),
    ],
)
def test_options_of_sampling_are_checked(change, words):
    with pytest.raises(ValueError, match=words):
        sampled(PROMPT, **change)


def test_predict_refuses_what_a_learned_table_has_no_place_for():
    learned = built(dataclasses.replace(CFG, position="learned", max_seq_len=8))
    assert predict(*learned, PROMPT, 4).shape == (2, 4, 11)
    with pytest.raises(ValueError, match="prompt 5 . 5 new tokens pass the capacity 8: give fewer$"):
        predict(*learned, PROMPT, 5)
    with pytest.raises(ValueError, match="steps = 0: give a whole number of at least 1"):
        predict(*learned, PROMPT, 0)


def test_bfloat16_is_sampled_at_sizes_whose_products_xla_cpu_cannot_widen():
    cfg = ModelConfig(
        vocab_size=65, max_seq_len=128, num_layers=2, embed_dim=256, num_heads=4, position="rope", dtype="bfloat16"
    )
    out = generate(*built(cfg), random_tokens(cfg, 8, 16), max_new_tokens=64, key=KEY, temperature=0)
    assert np.isfinite(out.log_probs).all()
