"""Sampling in float32: arguments, filters, stopping, rows. The equality with the full pass is in test_decode_x64.py."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import apply, built, random_tokens
from tolerances import FLOAT32

from jaxlm.config import ModelConfig
from jaxlm.decode import generate
from jaxlm.request import Request
from jaxlm.sampling import filter_logits

CFG = ModelConfig(
    vocab_size=11, max_seq_len=24, num_layers=2, embed_dim=12, num_heads=3, num_kv_heads=1, position="rope"
)
KEY = jax.random.key(7)


def draw(prompt, **kwargs):
    model, params = built(CFG)
    return generate(model, params, prompt, **{"max_new_tokens": 9, "key": KEY, **kwargs})


PROMPT = random_tokens(CFG, 2, 5)


def test_same_key_same_tokens_other_key_others():
    assert (draw(PROMPT).tokens == draw(PROMPT).tokens).all()
    assert (draw(PROMPT).tokens != draw(PROMPT, key=jax.random.key(8)).tokens).any()


def test_samples_of_a_prompt_are_rows_that_differ_and_repeat_with_their_own_keys():
    out = draw(PROMPT, num_samples=3)
    assert out.tokens.shape == (6, 9)
    assert len({tuple(row) for row in np.asarray(out.tokens)}) == 6
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(6))
    np.testing.assert_array_equal(draw(PROMPT, num_samples=3, key=keys).tokens, out.tokens)
    np.testing.assert_array_equal(draw(PROMPT[1:], key=keys[4:5]).tokens[0], out.tokens[4])


def test_log_probs_are_the_models_own_whatever_the_temperature_and_filters():
    model, params = built(CFG)
    out = draw(PROMPT, temperature=0.5, top_k=4)
    whole = jnp.concatenate([PROMPT, out.tokens], axis=1)
    full = jax.nn.log_softmax(apply(model, params, whole)[0])[:, 4:-1]
    expected = jnp.take_along_axis(full, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.log_probs, expected, atol=10 * FLOAT32)


def test_temperature_zero_is_greedy_and_ignores_the_key():
    model, params = built(CFG)
    out = draw(PROMPT, temperature=0)
    whole = jnp.concatenate([PROMPT, out.tokens], axis=1)
    np.testing.assert_array_equal(out.tokens, apply(model, params, whole)[0][:, 4:-1].argmax(-1))
    np.testing.assert_array_equal(out.tokens, draw(PROMPT, temperature=0, key=jax.random.key(1)).tokens)
    np.testing.assert_array_equal(out.tokens, draw(PROMPT, top_k=1).tokens)


def test_a_finished_row_stays_finished():
    free = np.asarray(draw(PROMPT, num_samples=4).tokens)
    stop = int(free[0, 3])
    out = draw(PROMPT, num_samples=4, stop_token=stop)
    for row, unstopped, length, log_probs in zip(out.tokens, free, out.lengths, out.log_probs, strict=True):
        expected = int((unstopped == stop).argmax()) if stop in unstopped else 9
        assert int(length) == expected
        np.testing.assert_array_equal(row[:expected], unstopped[:expected])
        assert (np.asarray(row[expected:]) == stop).all()
        assert (np.asarray(log_probs[expected + 1 :]) == 0).all()
    assert int(out.lengths[0]) <= 3


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0, 1, 2, 3]),
        (2, None, [1, 3]),
        (9, None, [0, 1, 2, 3]),
        (None, 0.45, [1, 3]),  # 0.4 alone does not reach it
        (None, 0.3, [1]),
        (None, 1.0, [0, 1, 2, 3]),
        (None, 0.75, [0, 1, 3]),
        (3, 0.75, [1, 3]),  # among the three left the two likeliest have 0.7 / 0.9
    ],
)
def test_filters_keep_what_they_say(top_k, top_p, kept):
    probs = np.array([[0.2, 0.4, 0.1, 0.3]])
    request = Request(
        dataclasses.replace(CFG, vocab_size=4), PROMPT[:, :1] % 4, max_new_tokens=1, key=KEY, top_k=top_k, top_p=top_p
    )
    filtered = filter_logits(jnp.log(probs), request.rules, request.settings)
    assert np.flatnonzero(np.isfinite(filtered[0])).tolist() == kept


def test_extremes_still_draw_the_likeliest():
    greedy = draw(PROMPT, temperature=0).tokens
    np.testing.assert_array_equal(draw(PROMPT, top_p=1e-50).tokens, greedy)
    np.testing.assert_array_equal(draw(PROMPT, temperature=1e-6).tokens, greedy)
    with pytest.raises(ValueError, match="temperature = 1e-42"):
        draw(PROMPT, temperature=1e-42)


def test_draws_follow_the_filtered_distribution():
    model, params = built(CFG)
    prompt = PROMPT[:1]
    logits = np.asarray(apply(model, params, prompt)[0][0, -1], np.float64) / 2.0
    top = np.sort(logits)[-6:]
    probs = np.where(logits >= top[0], np.exp(logits - top[-1]), 0)
    probs /= probs.sum()
    order = np.argsort(-probs)
    needed = int(np.searchsorted(np.cumsum(probs[order]), 0.9)) + 1
    probs[order[needed:]] = 0
    probs /= probs.sum()
    count = 20_000
    out = draw(prompt, max_new_tokens=1, num_samples=count, temperature=2.0, top_k=6, top_p=0.9)
    found = np.bincount(np.asarray(out.tokens[:, 0]), minlength=11)
    assert (found[probs == 0] == 0).all()
    deviation = np.abs(found - count * probs) / np.sqrt(count * probs * (1 - probs) + 1e-9)
    assert deviation[probs > 0].max() < 5


def test_past_a_learned_table_a_warning_tells_the_numbers():
    model, params = built(dataclasses.replace(CFG, position="learned", max_seq_len=8))
    with pytest.warns(UserWarning, match=r"prompt 5 \+ 9 new tokens pass .*max_seq_len = 8"):
        generate(model, params, PROMPT, max_new_tokens=9, key=KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, params, PROMPT, max_new_tokens=4, key=KEY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": jnp.zeros((2, 0), jnp.int32)}, r"prompt has shape \(2, 0\)"),
        ({"prompt": jnp.array([[0, 11]])}, "ids 0 to 11: the vocabulary has 0 to 10"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -0.5}, "temperature = -0.5"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"stop_token": 11}, "stop_token = 11"),
        ({"key": jax.random.split(KEY, 3)}, r"key has shape \(3,\): give one key, or one for each of the 2 rows"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        draw(change.pop("prompt", PROMPT), **change)
