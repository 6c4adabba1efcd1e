"""Bigrams and recurrent networks: what they may see, exact answers, padding, dropout, refusals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VARIANTS, family
from support import apply, built, random_tokens
from tolerances import FLOAT32, assert_close

from jaxlm.config import ModelConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.model.recurrent import slide


@pytest.mark.parametrize("name", ["bigram", "embedding_bigram"])
def test_a_bigram_sees_the_token_before_and_nothing_else(name):
    model, params = built(VARIANTS[name])
    tokens = random_tokens(model.cfg, 2, 7)
    logits, cache = apply(model, params, tokens)
    assert cache is None
    last, cache = apply(model, params, tokens[:, -1:], cache=model.init_cache(2, 7))
    assert cache == ()
    assert_close(logits[:, -1:], last, FLOAT32)
    if name == "bigram":
        np.testing.assert_array_equal(logits, params["table"][tokens])
    else:
        assert_close(logits, params["embedding"][tokens] @ params["embedding"].T, FLOAT32)


@pytest.mark.parametrize("name", ["elman_tanh", "lstm", "gru_scanned"])
def test_a_recurrent_network_sees_the_whole_past_and_no_future(name):
    model, params = built(VARIANTS[name])
    tokens = random_tokens(model.cfg, 1, 7)
    logits = np.asarray(apply(model, params, tokens)[0])[0]
    for s in range(7):
        changed = tokens.at[0, s].set((tokens[0, s] + 1) % 11)
        difference = np.abs(np.asarray(apply(model, params, changed)[0])[0] - logits).max(axis=-1)
        assert (difference[:s] == 0).all()
        assert (difference[s:] > 1e-6).all()


@pytest.fixture(scope="module")
def latch():
    """CMU 10-423, question 1.1: two hidden units latch a bit each, the output is slide(h1 + h2 - 1)."""
    cfg = ModelConfig(
        vocab_size=4,
        max_seq_len=4,
        family="recurrent",
        num_layers=1,
        embed_dim=2,
        cell_activation="slide",
        tie_embeddings=False,
        head_bias=True,
    )
    model = build_model(cfg)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = {
        "embedding": jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
        "block_0": {"cell": {"i": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}, "h": {"kernel": jnp.eye(2)}}},
        "head": {"kernel": jnp.ones((2, 4)), "bias": -jnp.ones(4)},
    }
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    return model, params


def test_an_elman_network_set_by_hand_answers_from_the_moment_both_bits_were_seen(latch):
    model, params = latch
    inputs = np.array(list(itertools.product(range(4), repeat=4)))  # every sequence of four
    expected = (np.bitwise_or.accumulate(inputs, axis=1) == 3).astype(float)
    logits, _ = apply(model, params, jnp.asarray(inputs))
    np.testing.assert_array_equal(slide(logits[..., 0]), expected)
    cache = model.init_cache(len(inputs), 4)
    for t in range(4):
        logits, cache = apply(model, params, jnp.asarray(inputs[:, t : t + 1]), cache=cache)
        np.testing.assert_array_equal(slide(logits[:, 0, 0]), expected[:, t])


@pytest.mark.parametrize("activation", ["tanh", "relu", "slide"])
def test_cell_activations_bound_what_they_should(activation):
    model, params = built(VARIANTS[f"elman_{activation}"])
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # large enough to meet every bound
    _, cache = apply(model, params, random_tokens(model.cfg, 50, 7), cache=model.init_cache(50, 7))
    hidden = np.asarray(cache.layers[0])
    assert hidden.shape == (50, 6)
    assert (hidden.min() < 0) == (activation == "tanh")
    assert (hidden.max() > 1) == (activation == "relu")


def test_padding_leaves_the_hidden_state_alone():
    model, params = built(VARIANTS["lstm"])
    tokens = random_tokens(model.cfg, 3, 7)
    _, cache = apply(model, params, tokens, cache=model.init_cache(3, 7), lengths=jnp.array([7, 3, 0]))
    _, short = apply(model, params, tokens[:, :3], cache=model.init_cache(3, 7))
    for state, other in zip(cache.layers, short.layers, strict=True):
        for ours, theirs in zip(state, other, strict=True):  # cell state and hidden state
            assert_close(ours[1], theirs[1], FLOAT32)
            assert np.abs(np.asarray(ours[0] - theirs[0])).max() > 1e-3
            np.testing.assert_array_equal(ours[2], jnp.zeros(6))


@pytest.mark.parametrize("name", ["embedding_bigram", "gru_scanned"])
def test_dropout_of_the_other_families_acts_in_training_only(name):
    for kind in ("dropout", "embedding_dropout"):
        cfg = dataclasses.replace(VARIANTS[name], **{kind: 0.5})
        model, params = built(cfg)
        tokens = random_tokens(cfg, 2, 7)
        plain = apply(*built(VARIANTS[name]), tokens)[0]
        np.testing.assert_array_equal(apply(model, params, tokens)[0], plain)
        one, other = (apply(model, params, tokens, train=True, key=jax.random.key(i))[0] for i in (1, 2))
        assert np.abs(np.asarray(one - other)).max() > 1e-3


def test_dropout_acts_after_each_recurrent_layer():
    cfg = dataclasses.replace(VARIANTS["elman_tanh"], dropout=0.5, tie_embeddings=False)
    model, params = built(cfg)
    params = {**params, "head": {"kernel": jnp.eye(6, 11)}}
    hidden = np.asarray(apply(model, params, random_tokens(cfg, 3, 7), train=True, key=jax.random.key(1))[0])[..., :6]
    assert 0.3 < (hidden == 0).mean() < 0.7  # tanh itself is never exactly 0


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_cells_begin_as_pytorchs_with_init_torch(cell):
    cfg = family("recurrent", cell=cell, embed_dim=16, num_layers=1, init="torch", tie_embeddings=False)
    for leaf in jax.tree.leaves(init_params(build_model(cfg), jax.random.key(0))["block_0"]):
        assert 0.15 < float(jnp.abs(leaf).max()) <= 0.25  # 1/sqrt(16)


@pytest.mark.parametrize("name", ["bigram", "embedding_bigram", "lstm"])
def test_ids_outside_give_nan_in_every_family(name):
    model, params = built(VARIANTS[name])
    logits = np.asarray(apply(model, params, jnp.array([[1, 11], [1, -1], [1, 2]]))[0])
    assert np.isnan(logits[:2, 1]).all()
    assert np.isfinite(logits[:, 0]).all()
    assert np.isfinite(logits[2]).all()
