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
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.decode.beam_search import beam_search
from jaxlm.decode.generate import MAX_BLOCK, _advance, blocks, generate, predict
from jaxlm.decode.prefill import _prefill
from jaxlm.decode.request import Request
from jaxlm.decode.score import score
from jaxlm.decode.stream import stream

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


def test_extremes_still_draw_the_likeliest():
    greedy = draw(PROMPT, temperature=0).tokens
    np.testing.assert_array_equal(draw(PROMPT, top_p=1e-50).tokens, greedy)
    np.testing.assert_array_equal(draw(PROMPT, temperature=1e-6).tokens, greedy)
    with pytest.raises(ValueError, match="temperature = 1e-42"):
        draw(PROMPT, temperature=1e-42)


def test_work_stops_when_every_row_is_done():
    model, params = built(CFG)
    stop = int(draw(PROMPT[:1], max_new_tokens=1).tokens[0, 0])
    request = Request(CFG, PROMPT[:1], max_new_tokens=9, key=KEY, stop_token=stop)
    assert [part.tokens.shape for part in blocks(model, params, request, 256)] == [(1, MAX_BLOCK)]
    out = draw(PROMPT[:1], stop_token=stop)
    assert out.tokens.tolist() == [[stop] * 9]
    assert out.lengths.tolist() == [0]
    assert out.log_probs[0, 0] < 0
    assert (out.log_probs[0, 1:] == 0).all()


def test_programs_are_compiled_per_bucket_never_per_value_or_exact_length():
    def programs():
        return _advance._cache_size(), _prefill._cache_size()

    draw(PROMPT, top_k=3, top_p=0.5, repetition_penalty=1.1)  # 2 prompts of up to 17, 16 slots
    before = programs()
    for length, count, top_k in ((3, 9, 3), (5, 12, 4), (9, 8, 3), (12, 5, 4), (2, 15, 3)):
        tokens = random_tokens(CFG, 2, length, seed=length)
        penalty = 1.0 + length / 10
        draw(tokens, max_new_tokens=count, temperature=length / 5, top_k=top_k, top_p=0.9, repetition_penalty=penalty)
    assert programs() == before
    draw(PROMPT, top_k=3, top_p=0.5, repetition_penalty=1.1, max_new_tokens=13)  # 32 slots
    assert programs() == (before[0] + 1, before[1] + 1)


def test_forbidden_tokens_are_never_drawn():
    free = draw(PROMPT, num_samples=20, temperature=5.0)
    assert {0, 4} < set(np.asarray(free.tokens).ravel().tolist())
    out = draw(PROMPT, num_samples=20, temperature=5.0, forbidden_tokens=[0, 4])
    assert not {0, 4} & set(np.asarray(out.tokens).ravel().tolist())


def test_the_repetition_penalty_knows_the_prompt_and_what_was_drawn():
    model, params = built(CFG)
    out = draw(PROMPT, temperature=0, repetition_penalty=1.5)
    whole = np.concatenate([PROMPT, out.tokens], axis=1)
    logits = np.asarray(apply(model, params, whole)[0])
    for row in range(2):
        for place in range(5, 14):
            past = list(set(whole[row, :place].tolist()))
            wanted = logits[row, place - 1].copy()
            wanted[past] = np.where(wanted[past] > 0, wanted[past] / 1.5, wanted[past] * 1.5)
            assert whole[row, place] == wanted.argmax()
    assert (out.tokens != draw(PROMPT, temperature=0).tokens).any()


LETTERS = CharTokenizer("abcdefghijk")


def test_a_stop_string_ends_its_row_in_the_stream():
    model, params = built(CFG)
    arguments = {"max_new_tokens": 9, "key": KEY, "num_samples": 2}
    whole = np.asarray(draw(PROMPT, num_samples=2).tokens)
    text = LETTERS.decode(whole[0])
    string = text[2:4]
    streamed = np.stack(
        list(stream(model, params, PROMPT, stop_strings=["zz", string], tokenizer=LETTERS, **arguments)), axis=1
    )
    for row, tokens in zip(streamed, whole, strict=True):
        place = LETTERS.decode(tokens).find(string)
        length = 9 if place < 0 else place + 2
        np.testing.assert_array_equal(row[:length], tokens[: len(row[:length])])
        assert (row[length:] == -1).all()
    with pytest.raises(ValueError, match=r"stop_strings = \['x'\]: give a tokenizer"):
        stream(model, params, PROMPT, stop_strings=["x"], **arguments)


def test_a_stream_begins_before_all_tokens_are_drawn(monkeypatch):
    calls, advance = [], _advance

    def counted(*args, **kwargs):
        calls.append(1)
        return advance(*args, **kwargs)

    monkeypatch.setattr("jaxlm.decode.generate._advance", counted)
    model, params = built(CFG)
    tokens = stream(model, params, PROMPT, max_new_tokens=17, key=KEY)
    next(tokens)
    assert len(calls) == 1
    assert len(list(tokens)) == 16
    assert len(calls) == 3


def test_what_overflows_is_refused_with_the_numbers_where_asked():
    words = r"prompt 5 \+ 9 new tokens pass the capacity 12: give fewer"
    with pytest.raises(ValueError, match=words):
        draw(PROMPT, capacity=12, on_overflow="error")
    draw(PROMPT, capacity=13, on_overflow="error")  # the last token is never fed
    model, params = built(dataclasses.replace(CFG, window=4))
    generate(model, params, PROMPT, max_new_tokens=9, key=KEY, capacity=12, on_overflow="error")  # no window reaches it


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
        ({"prompt_lengths": [5, 6]}, r"prompt_lengths = \[5, 6\]: each must be 1 to the prompt's width 5"),
        ({"prompt_lengths": [0, 5]}, r"prompt_lengths = \[0, 5\]"),
        ({"prompt_lengths": [5]}, r"prompt_lengths = \[5\]: give one integer for each of the 2 prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"capacity": 0}, "capacity = 0"),
        ({"min_p": 0.0}, "min_p = 0.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"forbidden_tokens": [3, 11]}, "forbidden_tokens holds 11"),
        ({"forbidden_tokens": range(11)}, "forbidden_tokens holds all 11 tokens"),
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


def test_arguments_of_the_wrong_type_are_named_where_no_type_checker_stands_before():
    for name, value, words in (
        ("prompt", jnp.zeros((2, 3)), "prompt has type float32: give integer token ids"),
        ("key", jax.random.PRNGKey(0), r"key has type uint32: give jax.random.key\(seed\)"),
        ("key", 0, "key has type int: give jax.random.key"),
        ("top_k", 2.0, "top_k = 2.0: give a whole number of at least 1"),
        ("on_overflow", "stop", "on_overflow = 'stop': give 'continue' or 'error'"),
    ):
        request = Request(CFG, PROMPT, max_new_tokens=1, key=KEY)
        object.__setattr__(request, name, value)
        with pytest.raises(ValueError, match=words):
            request.__post_init__()


def test_the_other_entries_name_bad_arguments_too():
    model, params = built(CFG)
    learned = built(dataclasses.replace(CFG, position="learned", max_seq_len=8))
    with pytest.raises(ValueError, match="prompt 5 . 5 new tokens pass the capacity 8"):
        predict(*learned, PROMPT, 5)
    with pytest.raises(ValueError, match="prompt 5 . 5 new tokens pass the capacity 8"):
        beam_search(*learned, PROMPT, max_new_tokens=5, beam_width=2)
    with pytest.raises(ValueError, match="beam_width = 0"):
        beam_search(model, params, PROMPT, max_new_tokens=5, beam_width=0)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 1\)"):
        score(model, params, PROMPT[:, :1])
    with pytest.raises(ValueError, match="tokens holds ids 0 to 11"):
        score(model, params, jnp.array([[0, 11]]))
    with pytest.raises(ValueError, match=r"weights has shape \(2, 5\): give one for each target, \(2, 4\)"):
        score(model, params, PROMPT, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="9 tokens are beyond the learned position table"):
        score(*learned, random_tokens(CFG, 1, 10))


def test_bfloat16_is_sampled_at_sizes_whose_products_xla_cpu_cannot_widen():
    cfg = ModelConfig(
        vocab_size=65, max_seq_len=128, num_layers=2, embed_dim=256, num_heads=4, position="rope", dtype="bfloat16"
    )
    out = generate(*built(cfg), random_tokens(cfg, 8, 16), max_new_tokens=64, key=KEY, temperature=0)
    assert np.isfinite(out.log_probs).all()
