"""Beam search against searching every text and against the same search in lists, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_x64 import CFG, KEY
from support import apply, built, random_tokens
from tolerances import FLOAT64

from jaxlm.decode.beam_search import beam_search
from jaxlm.decode.generate import generate
from jaxlm.decode.score import score

pytestmark = pytest.mark.x64


SMALL = dataclasses.replace(CFG, vocab_size=3)


def every_text(model, params, prompt, count, stop_token, penalty):
    """{text: score} of all that `count` tokens can say, a text ending with its first stop token."""
    texts = np.stack(np.meshgrid(*[range(3)] * count, indexing="ij"), axis=-1).reshape(-1, count)
    whole = np.concatenate([np.repeat(prompt, len(texts), axis=0), texts], axis=1)
    log_probs = np.asarray(jax.nn.log_softmax(apply(model, params, whole)[0]))[:, prompt.shape[1] - 1 : -1]
    log_probs = np.take_along_axis(log_probs, texts[..., None], axis=-1)[..., 0]
    scores = {}
    for text, each in zip(texts.tolist(), log_probs, strict=True):
        ends = [place + 1 for place, token in enumerate(text) if token in np.atleast_1d(stop_token)]
        size = min(ends, default=count)
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


def test_each_of_several_stop_tokens_ends_a_hypothesis():
    model, params = built(SMALL)
    prompt, count, stop = np.array([[1, 0, 2]]), 4, [2, 0]
    found = beam_search(model, params, prompt, max_new_tokens=count, beam_width=9, stop_token=stop)
    expected = every_text(model, params, prompt, count, stop, 1.0)
    assert len(expected) == 9
    for text, tokens, rank in zip(
        sorted(expected, key=expected.get, reverse=True), found.tokens[0], found.scores[0], strict=True
    ):
        assert tokens.tolist() == [*text, *[text[-1]] * (count - len(text))]
        assert abs(rank - expected[text]) < FLOAT64


@pytest.mark.parametrize(("forbidden", "texts"), [([0], 5), ([2], 16), ([1, 2], 1), ([0, 1], 1)])
def test_forbidden_tokens_are_left_out_and_the_scores_stay_the_models_own(forbidden, texts):
    """The texts are those of an exhaustive search without these tokens; places beyond them are marked empty."""
    model, params = built(SMALL)
    prompt, count, stop, width = np.array([[1, 0, 2]]), 4, 2, 17
    found = beam_search(
        model,
        params,
        prompt,
        max_new_tokens=count,
        beam_width=width,
        stop_token=stop,
        forbidden_tokens=forbidden,
    )
    every = every_text(model, params, prompt, count, stop, 1.0)
    expected = {text: value for text, value in every.items() if not set(text) & set(forbidden)}
    assert len(expected) == texts
    ordered = sorted(expected, key=expected.get, reverse=True)
    for place, text in enumerate(ordered):
        assert found.tokens[0, place].tolist() == [*text, *[stop] * (count - len(text))]
        assert abs(found.scores[0, place] - expected[text]) < FLOAT64
    assert np.isneginf(found.scores[0, texts:]).all()


def test_a_narrow_beam_without_some_tokens_goes_on_in_those_left():
    model, params = built(CFG)
    prompt = random_tokens(CFG, 2, 6)
    forbidden = np.unique(beam_search(model, params, prompt, max_new_tokens=9, beam_width=1).tokens)[:3].tolist()
    one = beam_search(model, params, prompt, max_new_tokens=9, beam_width=1, forbidden_tokens=forbidden)
    greedy = generate(model, params, prompt, max_new_tokens=9, key=KEY, temperature=0, forbidden_tokens=forbidden)
    np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(one.scores[:, 0], greedy.log_probs.sum(axis=1) / 9, atol=FLOAT64)


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
