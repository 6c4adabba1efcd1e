"""Every sampler against recomputing everything, in float64, where near-ties do not flip."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VARIANTS
from support import apply, built, random_tokens
from tolerances import FLOAT64

from jaxlm.config import ModelConfig
from jaxlm.decode.beam_search import beam_search
from jaxlm.decode.generate import generate, predict
from jaxlm.decode.prefill import capacities
from jaxlm.decode.request import Request
from jaxlm.decode.score import score
from jaxlm.decode.stream import stream
from jaxlm.decode.uncached import generate_naive

pytestmark = pytest.mark.x64

WIDE = {"dtype": "float64", "param_dtype": "float64"}
CFG = ModelConfig(
    vocab_size=11, max_seq_len=70, num_layers=2, embed_dim=12, num_heads=3, position="rope", window=(3, None), **WIDE
)
KEY = jax.random.key(3)


def assert_same(out, reference):
    np.testing.assert_array_equal(out.tokens, reference.tokens)
    np.testing.assert_allclose(out.log_probs, reference.log_probs, atol=FLOAT64)
    np.testing.assert_array_equal(out.lengths, reference.lengths)


def written_out(model, params, prompt, key, context, count):
    """Row r, token i by fold_in(fold_in(key, r), i) from a full pass over the latest `context` tokens, one by one."""
    rows = np.asarray(prompt)
    width = min(context, prompt.shape[1] + count)  # padded on the right to one shape: the past does not see it
    log_probs = []
    for i in range(count):
        latest = rows[:, -context:]
        padded = np.pad(latest, ((0, 0), (0, width - latest.shape[1])))
        logits = apply(model, params, jnp.asarray(padded))[0][:, latest.shape[1] - 1]
        keys = [jax.random.fold_in(jax.random.fold_in(key, r), i) for r in range(len(rows))]
        tokens = np.array([jax.random.categorical(k, row / 0.7) for k, row in zip(keys, logits, strict=True)])
        log_probs.append(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(rows)), tokens])
        rows = np.concatenate([rows, tokens[:, None].astype(np.int32)], axis=1)
    return rows[:, prompt.shape[1] :], np.stack(log_probs, axis=1)


@pytest.mark.parametrize("position", ["learned", "rope", "sinusoidal", "none"])
@pytest.mark.parametrize("prompt_len", [1, 8, 11])
def test_past_the_context_both_samplers_draw_what_is_written_out(position, prompt_len):
    cfg = dataclasses.replace(
        CFG, max_seq_len=8, position=position, window=None if position == "learned" else (3, None)
    )
    model, params = built(cfg)
    prompt = random_tokens(cfg, 2, prompt_len)
    if position == "learned":  # the latest max_seq_len tokens, at positions from 0
        reference, context = model, 8
    else:  # every window at most max_seq_len, over the whole history
        reference, context = built(dataclasses.replace(cfg, window=(3, 8)))[0], 1000
    tokens, log_probs = written_out(reference, params, prompt, KEY, context, 13)
    for sampler in (generate, generate_naive):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "prompt .* pass the learned position table")
            out = sampler(model, params, prompt, max_new_tokens=13, key=KEY, temperature=0.7)
        np.testing.assert_array_equal(out.tokens, tokens)
        np.testing.assert_allclose(out.log_probs, log_probs, atol=FLOAT64)


@pytest.mark.parametrize(
    "name",
    ["learned", "local", "summed_scores", "scan_layers", "wide_values", "lstm", "gru_scanned", "bigram"],
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
    {"temperature": 0},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1},
    {"repetition_penalty": 1.7, "forbidden_tokens": (1, 4), "stop_token": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "stop_token": 2},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_cached_naive_streamed_batched_and_alone_draw_the_same(filters):
    model, params = built(CFG)
    prompt, lengths = random_tokens(CFG, 3, 18), np.array([18, 2, 9])
    arguments = {"max_new_tokens": 40, "key": KEY, "prompt_lengths": lengths, **filters}
    out = generate(model, params, prompt, **arguments)
    request = Request(CFG, prompt, **arguments)
    assert capacities(model, params, request) == [32, 64]  # it grows on the way
    assert_same(out, generate_naive(model, params, prompt, **arguments))

    streamed = np.stack(list(stream(model, params, prompt, **arguments)), axis=1)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])
    assert (np.asarray(out.lengths) < streamed.shape[1]).all() or streamed.shape[1] == 40

    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3))
    for row, length in enumerate(lengths):
        alone = {**arguments, "key": row_keys[row : row + 1], "prompt_lengths": None}
        single = generate(model, params, prompt[row : row + 1, :length], **alone)
        assert_same(single, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], out))


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
    arguments = {"max_new_tokens": 16, "key": KEY, "prompt_lengths": [9, 2], "capacity": 12, "stop_token": 2}
    with pytest.warns(UserWarning, match=r"prompt 9 \+ 16 new tokens pass .*capacity 12, max_seq_len = 20"):
        out = generate(model, params, random_tokens(cfg, 2, 9), **arguments)
    with pytest.warns(UserWarning, match="capacity 12"):
        naive = generate_naive(model, params, random_tokens(cfg, 2, 9), **arguments)
    with pytest.warns(UserWarning, match="capacity 12"):
        streamed = np.stack(list(stream(model, params, random_tokens(cfg, 2, 9), **arguments)), axis=1)
    assert_same(out, naive)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])


def test_a_prompt_in_pieces_is_the_prompt(monkeypatch):
    model, params = built(CFG)
    prompt, arguments = random_tokens(CFG, 2, 37), {"max_new_tokens": 5, "key": KEY, "prompt_lengths": [37, 20]}
    whole = generate(model, params, prompt, **arguments)
    monkeypatch.setattr("jaxlm.decode.prefill.PREFILL", 16)
    assert_same(generate(model, params, prompt, **arguments), whole)


def test_predict_gives_the_logits_of_greedy_feedback():
    model, params = built(CFG)
    prompt, lengths = random_tokens(CFG, 2, 5), np.array([5, 3])
    logits = predict(model, params, prompt, 6, prompt_lengths=lengths)
    greedy = generate(model, params, prompt, max_new_tokens=6, key=KEY, temperature=0, prompt_lengths=lengths)
    for row, length in enumerate(lengths):
        whole = jnp.concatenate([prompt[row, :length], greedy.tokens[row]])[None]
        full = apply(model, params, whole)[0][0, length - 1 : -1]
        np.testing.assert_allclose(logits[row], full, atol=FLOAT64)


def test_score_is_the_log_probability_of_what_follows_the_first_token():
    model, params = built(CFG)
    prompt = random_tokens(CFG, 2, 5)
    out = generate(model, params, prompt, max_new_tokens=6, key=KEY, temperature=0.5, top_k=3)
    whole = jnp.concatenate([prompt, out.tokens], axis=1)
    scores = score(model, params, whole)
    np.testing.assert_allclose(scores - score(model, params, prompt), out.log_probs.sum(axis=1), atol=FLOAT64)
    weights = np.zeros((2, 10))
    weights[:, 4:] = 0.5
    np.testing.assert_allclose(score(model, params, whole, weights), 0.5 * out.log_probs.sum(axis=1), atol=FLOAT64)


SMALL = dataclasses.replace(CFG, vocab_size=3)


def every_text(model, params, prompt, count, stop_token, penalty):
    """{text: score} of all that `count` tokens can say, a text ending with its first stop token."""
    texts = np.stack(np.meshgrid(*[range(3)] * count, indexing="ij"), axis=-1).reshape(-1, count)
    whole = np.concatenate([np.repeat(prompt, len(texts), axis=0), texts], axis=1)
    log_probs = np.asarray(jax.nn.log_softmax(apply(model, params, whole)[0]))[:, prompt.shape[1] - 1 : -1]
    log_probs = np.take_along_axis(log_probs, texts[..., None], axis=-1)[..., 0]
    scores = {}
    for text, each in zip(texts.tolist(), log_probs, strict=True):
        size = text.index(stop_token) + 1 if stop_token in text else count
        scores[tuple(text[:size])] = each[:size].sum() / size**penalty
    return scores


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_a_beam_as_wide_as_the_tree_finds_the_best_texts_in_order(penalty):
    model, params = built(SMALL)
    prompt, count, stop = np.array([[1, 0, 2], [0, 0, 1]]), 4, 2
    found = beam_search(
        model, params, prompt, max_new_tokens=count, beam_width=31, length_penalty=penalty, stop_token=stop
    )
    for row in range(2):
        expected = every_text(model, params, prompt[row : row + 1], count, stop, penalty)
        assert len(expected) == 31
        ordered = sorted(expected, key=expected.get, reverse=True)
        for text, tokens, length, rank in zip(
            ordered, found.tokens[row], found.lengths[row], found.scores[row], strict=True
        ):
            assert tokens.tolist() == [*text, *[stop] * (count - len(text))]
            assert length == len(text) - (text[-1] == stop)
            assert abs(rank - expected[text]) < FLOAT64


def searched(model, params, prompt, count, width, penalty, stop):
    """The same search for one prompt, in lists: [(score, text)] best first."""
    live, finished = [(0.0, ())], []
    for step in range(count):
        new = []
        for total, text in live:
            whole = jnp.concatenate([prompt, jnp.asarray(text, jnp.int32).reshape(1, -1)], axis=1)
            padded = jnp.pad(whole, ((0, 0), (0, prompt.shape[1] + count - whole.shape[1])))
            log_probs = jax.nn.log_softmax(apply(model, params, padded)[0])[0, whole.shape[1] - 1]
            new += [(total + float(value), (*text, token)) for token, value in enumerate(log_probs)]
        new = sorted(new, reverse=True)[: 2 * width]
        finished += [(total / (step + 1) ** penalty, text) for total, text in new if text[-1] == stop]
        finished = sorted(finished, reverse=True)[:width]
        live = [(total, text) for total, text in new if text[-1] != stop][:width]
    finished += [(total / count**penalty, text) for total, text in live]
    return sorted(finished, reverse=True)[:width]


@pytest.mark.parametrize(("width", "penalty"), [(2, 0.0), (3, 1.0), (4, 3.0)])
def test_narrow_beams_find_what_the_search_in_lists_finds(width, penalty):
    model, params = built(CFG)
    prompt = random_tokens(CFG, 2, 14)
    found = beam_search(model, params, prompt, max_new_tokens=9, beam_width=width, length_penalty=penalty, stop_token=5)
    for row in range(2):
        expected = searched(model, params, prompt[row : row + 1], 9, width, penalty, 5)
        np.testing.assert_allclose(found.scores[row], [score for score, _ in expected], atol=FLOAT64)
        for tokens, (_, text) in zip(found.tokens[row], expected, strict=True):
            assert tokens.tolist() == [*text, *[5] * (9 - len(text))]


def test_more_tokens_than_a_call_of_the_compiled_loop_returns():
    cfg = dataclasses.replace(CFG, max_seq_len=300)
    model, params = built(cfg)
    arguments = {"max_new_tokens": 270, "key": KEY}
    prompt = random_tokens(cfg, 2, 3)
    assert_same(generate(model, params, prompt, **arguments), generate_naive(model, params, prompt, **arguments))


def test_a_beam_of_one_is_greedy_and_a_ragged_batch_is_its_rows():
    model, params = built(CFG)
    prompt = random_tokens(CFG, 2, 6)
    one = beam_search(model, params, prompt, max_new_tokens=9, beam_width=1)
    greedy = generate(model, params, prompt, max_new_tokens=9, key=KEY, temperature=0)
    np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(one.scores[:, 0], greedy.log_probs.sum(axis=1) / 9, atol=FLOAT64)
    arguments = {"max_new_tokens": 9, "beam_width": 4, "length_penalty": 0.6, "stop_token": 5}
    ragged = beam_search(model, params, prompt, prompt_lengths=[6, 2], **arguments)
    for row, length in enumerate((6, 2)):
        alone = beam_search(model, params, prompt[row : row + 1, :length], **arguments)
        np.testing.assert_array_equal(ragged.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(ragged.scores[row], alone.scores[0], atol=FLOAT64)
        totals = score(
            model,
            params,
            jnp.concatenate([jnp.repeat(prompt[row : row + 1, :length], 4, 0), ragged.tokens[row]], axis=1),
            weights=np.concatenate(
                [np.zeros((4, length - 1)), np.arange(9)[None] <= ragged.lengths[row][:, None]], axis=1
            ),
        )
        sizes = np.minimum(ragged.lengths[row] + 1, 9)
        np.testing.assert_allclose(ragged.scores[row], totals / sizes**0.6, atol=FLOAT64)
