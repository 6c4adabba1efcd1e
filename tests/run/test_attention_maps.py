"""Attention maps are those that the output is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VARIANTS, variant
from support import apply, built, random_tokens

from jaxlm.errors import CheckError
from jaxlm.model.build import build_model
from jaxlm.run.attention_maps import attention_maps


@pytest.mark.parametrize("name", ["rope", "local", "summed_scores", "scan_layers", "additive"])
def test_attention_maps_are_distributions_over_what_is_seen(name):
    cfg = VARIANTS[name]
    model, params = built(cfg)
    maps = attention_maps(model, params, random_tokens(cfg, 2, 6))
    assert len(maps) == cfg.num_layers
    for weights, window in zip(maps, cfg.layer_windows, strict=True):
        assert weights.shape == (2, cfg.attention_maps, 6, 6)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
        distance = np.arange(6)[:, None] - np.arange(6)
        seen = (distance >= 0) & (distance < (window or 99))
        assert (weights[..., ~seen] == 0).all()
        assert (weights[..., seen] > 0).all()
    assert np.abs(maps[0][:, 0] - maps[0][:, 1]).max() > 1e-3


def test_attention_maps_explain_the_output():
    """One layer without MLP, norm or residual: logits are the maps times the values, through output and head."""
    cfg = variant(num_layers=1, mlp_dim=0, norm="none", residual=False, use_bias=False)
    model, params = built(cfg)
    tokens = random_tokens(cfg, 2, 6)
    weights, layer = attention_maps(model, params, tokens)[0], params["block_0"]["attention"]
    values = (params["embedding"][tokens] @ layer["value"]["kernel"]).reshape(2, 6, 2, 6).repeat(2, axis=2)
    heads = jnp.einsum("bnts,bsnh->btnh", weights, values).reshape(2, 6, 24)
    expected = heads @ layer["out"]["kernel"] @ params["embedding"].T
    np.testing.assert_allclose(apply(model, params, tokens)[0], expected, rtol=1e-3, atol=1e-4)


def test_maps_that_are_not_finite_are_refused_with_the_layer_and_the_parameter():
    cfg = VARIANTS["rope"]
    model, params = built(cfg)
    params = jax.tree.map(jnp.array, params)
    layer = params["block_1"]["attention"]["query"]
    layer["kernel"] = layer["kernel"].at[0, 0].set(jnp.nan)
    words = "the attention weights of layer 1 are not finite: block_1/attention/query/kernel holds nan"
    with pytest.raises(CheckError, match=words):
        attention_maps(model, params, random_tokens(cfg, 1, 3))


def test_a_family_without_attention_has_no_maps():
    model, params = built(VARIANTS["lstm"])
    with pytest.raises(ValueError, match="family = 'recurrent' has no attention maps"):
        attention_maps(build_model(model.cfg), params, random_tokens(model.cfg, 1, 3))
