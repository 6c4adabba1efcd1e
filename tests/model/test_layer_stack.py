"""Scanned and recomputed layers against plain ones, and parameters converted both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VARIANTS, variant
from support import built, random_tokens
from tolerances import FLOAT32, assert_close

from jaxlm.model.build import build_model, init_params
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.optim import decay_mask

PATTERN = variant(num_layers=4, window=(3, None))


def loss_and_grads(cfg, params, tokens):
    model = build_model(cfg)
    return jax.jit(jax.value_and_grad(lambda p: (model.apply({"params": p}, tokens)[0] ** 2).sum()))(params)


@pytest.mark.parametrize(
    ("cfg", "changes"),
    [
        (PATTERN, [{"scan_layers": True}, {"remat": True}]),
        (VARIANTS["lstm"], [{"scan_layers": True, "remat": True}]),
        pytest.param(PATTERN, [{"scan_layers": True, "remat": True}], marks=pytest.mark.slow),
        pytest.param(VARIANTS["lstm"], [{"scan_layers": True}, {"remat": True}], marks=pytest.mark.slow),
    ],
    ids=["blocks", "cells", "blocks, both", "cells, each"],
)
def test_scanned_and_recomputed_layers_give_the_value_and_gradients_of_plain_ones(cfg, changes):
    _, params = built(cfg)
    tokens = random_tokens(cfg, 3, 7)
    loss, grads = loss_and_grads(cfg, params, tokens)
    for fields in changes:
        other = dataclasses.replace(cfg, **fields)
        made = stack_params(cfg, params) if other.scan_layers else params
        other_loss, other_grads = loss_and_grads(other, made, tokens)
        if other.scan_layers:
            other_grads = unstack_params(other, other_grads)
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))  # some leaves are zero in theory
        for ours, theirs in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
            assert_close(ours / scale + 1, theirs / scale + 1, FLOAT32)


def test_parameters_convert_to_the_last_bit_and_have_the_layout_of_init():
    scanned = dataclasses.replace(PATTERN, scan_layers=True)
    _, params = built(scanned)
    assert set(params["layers"]) == {"block_0", "block_1"}
    stacked = params["layers"]["block_1"]["mlp"]["up"]["kernel"]
    assert stacked.shape == (2, 24, 20)
    plain = unstack_params(scanned, params)
    assert jax.tree.structure(plain) == jax.tree.structure(built(PATTERN)[1])
    np.testing.assert_array_equal(plain["block_3"]["mlp"]["up"]["kernel"], stacked[1])  # the second of place 1
    jax.tree.map(np.testing.assert_array_equal, stack_params(PATTERN, plain), params)


def test_weight_decay_is_the_same_for_stacked_layers():
    cfg = variant(num_layers=4, window=(3, None), attention_score="additive", qk_norm=True)
    params = built(cfg)[1]
    plain, stacked = decay_mask(params), decay_mask(stack_params(cfg, params))
    assert {leaf for place in stacked["layers"].values() for leaf in jax.tree.leaves(place)} == {True, False}
    for i in range(4):
        assert stacked["layers"][f"block_{i % 2}"] == plain[f"block_{i}"]
    assert not plain["block_0"]["mlp"]["up"]["bias"]


def test_every_scanned_layer_begins_with_draws_of_its_own():
    model = build_model(variant(num_layers=4, scan_layers=True))
    kernel = np.asarray(init_params(model, jax.random.key(0))["layers"]["block_0"]["mlp"]["up"]["kernel"])
    assert all(np.abs(kernel[0] - kernel[i]).max() > 1e-3 for i in (1, 2, 3))


def test_every_scanned_layer_drops_units_of_its_own():
    """Layers of equal weights on a residual stream they do not change drop alike only if they share one mask."""
    cfg = variant(num_layers=2, scan_layers=True, mlp_dim=0, norm="none", tie_embeddings=False, position="none")
    cfg = dataclasses.replace(cfg, use_bias=True, qkv_bias=False, dropout=0.5)
    model, params = built(cfg)
    layers = jax.tree.map(jnp.zeros_like, params["layers"])
    layers["block_0"]["attention"]["out"]["bias"] = jnp.ones((2, 24))  # each layer adds its own mask, times 2
    params = {**params, "layers": layers, "embedding": jnp.zeros((11, 24)), "head": {"kernel": jnp.eye(24)[:, :11]}}
    rngs = {"dropout": jax.random.key(3)}
    added = np.asarray(model.apply({"params": params}, random_tokens(cfg, 2, 7), train=True, rngs=rngs)[0])
    assert set(np.unique(added)) == {0.0, 2.0, 4.0}  # 2 where one layer kept the unit and the other did not


@pytest.mark.parametrize(
    ("convert", "change", "words"),
    [
        (
            stack_params,
            lambda p: {k: v for k, v in p.items() if k != "block_2"},
            "the layers block_0, block_1, block_3;",
        ),
        (stack_params, lambda p: {**p, "block_4": p["block_0"]}, "block_4; num_layers = 4"),
        (
            stack_params,
            lambda p: {**p, "block_2": {"mlp": p["block_2"]["mlp"]}},
            "block_2 has other parameters than block_0",
        ),
        (unstack_params, lambda p: p, "not stacked"),
        (unstack_params, lambda p: {"layers": {"block_0": p["block_0"]}}, "need block_0, block_1"),
        (
            unstack_params,
            lambda p: {"layers": jax.tree.map(lambda leaf: leaf[:1], stack_params(PATTERN, p)["layers"])},
            r"hold \[1\] periods of 2 layers, num_layers = 4 needs 2",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(convert, change, words):
    with pytest.raises(ValueError, match=words):
        convert(PATTERN, change(built(PATTERN)[1]))


def test_layers_that_cannot_be_stacked_are_refused():
    cfg = variant(num_layers=3, window=(3, None))
    with pytest.raises(ValueError, match="num_layers = 3 is not a multiple of the period 2"):
        stack_params(cfg, built(cfg)[1])


def test_recomputing_takes_less_memory():
    def backward_bytes(remat):  # scanned: XLA's CPU backend undoes the recomputation of unrolled layers
        cfg = variant(num_layers=8, embed_dim=64, mlp_dim=256, max_seq_len=128, scan_layers=True, remat=remat)
        model, tokens = build_model(cfg), jax.ShapeDtypeStruct((4, 128), jnp.int32)
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        grad = jax.jit(jax.grad(lambda p, tokens: (model.apply({"params": p}, tokens)[0] ** 2).mean()))
        return grad.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert backward_bytes(True) < 0.6 * backward_bytes(False)
