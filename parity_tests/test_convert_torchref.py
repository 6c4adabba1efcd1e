"""Parameters to and from torchref's state dict: nothing is lost or ignored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversions import BASE, CONFIGS, assert_bitwise, config, random_params

import torchref
from jaxlm.convert import from_torchref, to_torchref
from jaxlm.errors import UserError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


NARROW = ["plain", "stacked", "bigram", "embedding_bigram, untied", "gru, stacked"]
"""One of each family, and stacked."""


@pytest.mark.parametrize(
    ("name", "param_dtype"), [(name, "float32") for name in CONFIGS] + [(name, "bfloat16") for name in NARROW]
)
def test_both_ways_and_back_every_bit_stays(name, param_dtype):
    cfg = dataclasses.replace(CONFIGS[name], param_dtype=param_dtype)
    params = random_params(cfg)
    state = to_torchref(cfg, params)
    assert {tensor.dtype for tensor in state.values()} == {TYPES[param_dtype]}
    assert_bitwise(from_torchref(cfg, state), params)

    model = torchref.build_model(cfg)
    model.load_state_dict(state, strict=True)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[key].equal(tensor) for key, tensor in state.items())

    fresh = torchref.build_model(cfg).state_dict(keep_vars=True)
    again = to_torchref(cfg, from_torchref(cfg, fresh))
    assert again.keys() == fresh.keys()
    for key, tensor in fresh.items():
        assert again[key].dtype == tensor.dtype
        assert again[key].equal(tensor)


def test_each_number_goes_where_its_name_says():
    cfg = config(num_heads=4, num_kv_heads=2, tie_embeddings=False, head_bias=True, attention_score="concat")
    params = random_params(cfg)
    state = to_torchref(cfg, params)
    block = params["block_1"]
    pairs = {
        "embedding.weight": params["embedding"],
        "position_embedding.weight": params["position_embedding"],
        "final_norm.weight": params["final_norm"]["scale"],
        "final_norm.bias": params["final_norm"]["bias"],
        "head.weight": params["head"]["kernel"].T,
        "head.bias": params["head"]["bias"],
        "blocks.1.attention_norm.weight": block["attention_norm"]["scale"],
        "blocks.1.attention.query.weight": block["attention"]["query"]["kernel"].T,
        "blocks.1.attention.key.weight": block["attention"]["key"]["kernel"].T,
        "blocks.1.attention.value.bias": block["attention"]["value"]["bias"],
        "blocks.1.attention.score_key": block["attention"]["score_key"],
        "blocks.1.mlp.down.weight": block["mlp"]["down"]["kernel"].T,
    }
    for name, array in pairs.items():
        np.testing.assert_array_equal(state[name], array, strict=True)


def test_stacked_layers_come_out_in_the_order_of_the_network():
    cfg = CONFIGS["stacked"]
    params = random_params(cfg)
    state = to_torchref(cfg, params)
    plain = dataclasses.replace(cfg, scan_layers=False)
    for i in range(4):
        kernel = params["layers"][f"block_{i % 2}"]["mlp"]["up"]["kernel"][i // 2]
        np.testing.assert_array_equal(state[f"blocks.{i}.mlp.up.weight"], kernel.T)
    unstacked = from_torchref(plain, state)
    assert "layers" not in unstacked
    assert_bitwise(from_torchref(cfg, to_torchref(plain, unstacked)), params)


@pytest.mark.parametrize("name", ["plain", "stacked", "lstm"])
@pytest.mark.parametrize("param_dtype", list(TYPES))
def test_what_comes_out_is_a_copy(name, param_dtype):
    cfg = dataclasses.replace(CONFIGS[name], param_dtype=param_dtype)
    params = random_params(cfg)
    kept = jax.tree.map(np.array, params)
    state = to_torchref(cfg, params)
    back = from_torchref(cfg, state)
    for tensor in state.values():
        tensor.fill_(7)
    assert_bitwise(params, kept)
    assert_bitwise(back, kept)


def edited(tree, path, leaf):
    """The tree with the leaf at `path` (a/b/c) added, or removed if it is None."""
    name, _, rest = path.partition("/")
    if rest:
        return {**tree, name: edited(tree.get(name, {}), rest, leaf)}
    others = {key: value for key, value in tree.items() if key != name}
    return others if leaf is None else others | {name: leaf}


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("block_1/mlp/up/kernel", None, r"block_1/mlp/up/kernel is absent, not \[12, 13\] float32"),
        (
            "block_2/mlp/up/kernel",
            np.ones((12, 13), np.float32),
            r"block_2/mlp/up/kernel is \[12, 13\] float32, not absent",
        ),
        ("head/kernel", np.ones((12, 11), np.float32), r"head/kernel is \[12, 11\] float32, not absent"),
        (
            "block_0/attention/query/bias",
            np.ones(11, np.float32),
            r"block_0/attention/query/bias is \[11\] float32, not \[12\] float32",
        ),
        (
            "block_0/mlp/down/kernel",
            np.ones((12, 13), np.float32),
            r"block_0/mlp/down/kernel is \[12, 13\] .* not \[13, 12\]",
        ),
        ("embedding", np.ones((11, 12), jnp.bfloat16), r"embedding is \[11, 12\] bfloat16, not \[11, 12\] float32"),
        ("final_norm/scale", np.ones(12), r"final_norm/scale is \[12\] float64, not \[12\] float32"),
    ],
)
def test_parameters_that_are_not_the_configs_are_named(path, leaf, message):
    with pytest.raises(UserError, match=f"the parameters do not fit the config: {message}"):
        to_torchref(BASE, edited(random_params(BASE), path, leaf))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.1.mlp.up.weight", None, r"blocks.1.mlp.up.weight is absent, not \[13, 12\] float32"),
        ("blocks.2.mlp.up.weight", torch.ones(13, 12), r"blocks.2.mlp.up.weight is \[13, 12\] float32, not absent"),
        ("head.weight", None, r"head.weight is absent, not \[11, 12\] float32"),
        ("head.bias", torch.ones(11), r"head.bias is \[11\] float32, not absent"),
        (
            "blocks.0.attention.query.bias",
            torch.ones(11),
            r"blocks.0.attention.query.bias is \[11\] float32, not \[12\] float32",
        ),
        ("blocks.0.mlp.down.weight", torch.ones(13, 12), r"blocks.0.mlp.down.weight is \[13, 12\] .* not \[12, 13\]"),
        ("final_norm.weight", torch.ones(12).bfloat16(), r"final_norm.weight is \[12\] bfloat16, not \[12\] float32"),
        ("final_norm.weight", torch.ones(12).double(), r"final_norm.weight is \[12\] float64, not \[12\] float32"),
    ],
)
def test_a_state_dict_that_is_not_the_configs_is_named(name, tensor, message):
    state = torchref.build_model(BASE).state_dict()
    with pytest.raises(UserError, match=f"the state dict does not fit the config: {message}"):
        from_torchref(BASE, edited(state, name, tensor))


def test_all_that_is_wrong_is_named_at_once():
    params = edited(random_params(BASE), "block_0/mlp/up/bias", None)
    with pytest.raises(UserError, match=r"block_0/mlp/up/bias is absent, .*; surplus is \[1\] float32, not absent$"):
        to_torchref(BASE, params | {"surplus": jnp.ones(1)})


def test_a_head_of_its_own_is_not_taken_for_a_tied_one():
    state = torchref.build_model(config(tie_embeddings=False)).state_dict()
    with pytest.raises(UserError, match=r"head.weight differs from embedding.weight: give tie_embeddings = False"):
        from_torchref(BASE, state)
    tied = from_torchref(BASE, state | {"head.weight": state["embedding.weight"].clone()})
    assert "head" not in tied


def test_stacked_and_unstacked_parameters_are_told_apart():
    stacked = CONFIGS["stacked"]
    plain = dataclasses.replace(stacked, scan_layers=False)
    with pytest.raises(UserError, match="the parameters are not stacked"):
        to_torchref(stacked, random_params(plain))
    with pytest.raises(UserError, match="layers/block_0/attention/key/bias is .*, not absent"):
        to_torchref(plain, random_params(stacked))
    params = edited(random_params(stacked), "layers/block_1/mlp/up/bias", None)
    with pytest.raises(UserError, match=r"block_1/mlp/up/bias is absent, not \[13\] float32"):
        to_torchref(stacked, params)


def test_numbers_that_are_none_convert_too():
    params = random_params(BASE)
    strange = jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-45, 3.4e38] * 2, jnp.float32)
    params = edited(params, "final_norm/scale", strange) | {"embedding": params["embedding"].at[0, 0].set(jnp.nan)}
    assert_bitwise(from_torchref(BASE, to_torchref(BASE, params)), params)
