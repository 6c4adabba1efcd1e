"""Cached, naive, streamed, batched and single sampling give the same tokens: float64, where near-ties do not flip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_x64 import CFG, KEY, WIDE, assert_same
from models import VARIANTS
from support import apply, built, random_tokens
from tolerances import FLOAT64

from jaxlm.decode.capacity import cache_capacities
from jaxlm.decode.generate import generate, predict
from jaxlm.decode.prefill import grow
from jaxlm.decode.request import request_from
from jaxlm.decode.stream import stream
from jaxlm.decode.uncached import generate_naive
from jaxlm.errors import PositionTableWarning

pytestmark = pytest.mark.x64


@pytest.mark.parametrize(
    "name",
    [
        *("learned", "local", "scan_layers", "lstm"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("summed_scores", "wide_values", "gru_scanned", "bigram")
        ),
    ],
)
def test_cached_and_naive_draw_the_same_in_every_family(name):
    cfg = dataclasses.replace(VARIANTS[name], max_seq_len=30, **WIDE)
    model, params = built(cfg)
    arguments = {"max_new_tokens": 14, "key": KEY, "prompt_lengths": [4, 1, 3], "num_samples": 2, "stop_token": 2}
    arguments["repetition_penalty"] = 1.3
    prompt = random_tokens(cfg, 3, 40)  # far wider than the longest
    out = generate(model, params, prompt, **arguments)
    assert_same(out, generate_naive(model, params, prompt, **arguments))
    assert len(set(out.lengths.tolist())) > 1


FILTERS = [
    {"temperature": 0.7},
    pytest.param({"temperature": 0}, marks=pytest.mark.slow),
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1},
    {"repetition_penalty": 1.7, "forbidden_tokens": (1, 4), "stop_token": 2},
    pytest.param({"temperature": 0, "repetition_penalty": 1.3, "stop_token": 2}, marks=pytest.mark.slow),
    {"stop_token": (2, 7)},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_cached_naive_streamed_batched_and_alone_draw_the_same(filters):
    model, params = built(CFG)
    prompt, lengths = random_tokens(CFG, 3, 18), np.array([18, 2, 9])
    arguments = {"max_new_tokens": 40, "key": KEY, "prompt_lengths": lengths, **filters}
    out = generate(model, params, prompt, **arguments)
    request = request_from(CFG, prompt, **arguments)
    assert cache_capacities(CFG, params, 3, 18, request.plan) == [32, 64]  # it grows on the way
    assert_same(out, generate_naive(model, params, prompt, **arguments))

    streamed = np.stack(list(stream(model, params, prompt, **arguments)), axis=1)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])
    assert (np.asarray(out.lengths) < streamed.shape[1]).all() or streamed.shape[1] == 40

    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3))
    for row, length in enumerate(lengths):
        alone = {**arguments, "key": row_keys[row : row + 1], "prompt_lengths": None}
        single = generate(model, params, prompt[row : row + 1, :length], **alone)
        assert_same(single, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], out))


@pytest.mark.parametrize("new", [30, 75])
def test_a_cache_grows_no_further_than_it_must(new, monkeypatch):
    model, params = built(dataclasses.replace(CFG, max_seq_len=128))
    prompt, arguments = random_tokens(CFG, 2, 6), {"max_new_tokens": new, "key": KEY, "num_samples": 8}
    grown = []
    monkeypatch.setattr("jaxlm.decode.generate.grow", lambda *args: grown.append(args[2]) or grow(*args))
    out = generate(model, params, prompt, **arguments)
    assert_same(out, generate_naive(model, params, prompt, **arguments))
    assert grown == {30: [64], 75: [64, 96]}[new]  # of 64 and 128


def test_a_capacity_that_holds_everything_changes_nothing_and_a_smaller_one_is_a_window():
    model, params = built(CFG)
    prompt, arguments = random_tokens(CFG, 2, 6), {"max_new_tokens": 20, "key": KEY}
    out = generate(model, params, prompt, **arguments)
    for capacity in (25, 26, 64, 300):
        assert_same(generate(model, params, prompt, capacity=capacity, **arguments), out)
    for capacity in (24, 5):
        windowed = built(dataclasses.replace(CFG, window=(3, capacity)))[0]
        rolled = generate(model, params, prompt, capacity=capacity, **arguments)
        assert_same(rolled, generate_naive(windowed, params, prompt, **arguments))
        assert_same(rolled, generate_naive(model, params, prompt, capacity=capacity, **arguments))
    assert (rolled.tokens != out.tokens).any()


def test_a_learned_table_goes_on_from_the_latest_tokens_of_its_capacity_also_in_a_ragged_batch():
    cfg = dataclasses.replace(CFG, position="learned", window=None, max_seq_len=20)
    model, params = built(cfg)
    arguments = {"max_new_tokens": 16, "key": KEY, "prompt_lengths": [9, 2], "capacity": 12, "stop_token": (2, 6)}
    with pytest.warns(PositionTableWarning, match=r"prompt 9 \+ 16 new tokens pass .*capacity 12, max_seq_len = 20"):
        out = generate(model, params, random_tokens(cfg, 2, 9), **arguments)
    with pytest.warns(PositionTableWarning, match="capacity 12"):
        naive = generate_naive(model, params, random_tokens(cfg, 2, 9), **arguments)
    with pytest.warns(PositionTableWarning, match="capacity 12"):
        streamed = np.stack(list(stream(model, params, random_tokens(cfg, 2, 9), **arguments)), axis=1)
    assert_same(out, naive)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])


def test_predict_gives_the_logits_of_greedy_feedback():
    model, params = built(CFG)
    prompt, lengths = random_tokens(CFG, 2, 5), np.array([5, 3])
    logits = predict(model, params, prompt, 6, prompt_lengths=lengths)
    greedy = generate(model, params, prompt, max_new_tokens=6, key=KEY, temperature=0, prompt_lengths=lengths)
    for row, length in enumerate(lengths):
        whole = jnp.concatenate([prompt[row, :length], greedy.tokens[row]])[None]
        full = apply(model, params, whole)[0][0, length - 1 : -1]
        np.testing.assert_allclose(logits[row], full, atol=FLOAT64)


@pytest.mark.slow
def test_more_tokens_than_a_call_of_the_compiled_loop_returns():
    cfg = dataclasses.replace(CFG, max_seq_len=300)
    model, params = built(cfg)
    arguments = {"max_new_tokens": 270, "key": KEY}
    prompt = random_tokens(cfg, 2, 3)
    assert_same(generate(model, params, prompt, **arguments), generate_naive(model, params, prompt, **arguments))
