"""Costs read from shapes, against formulas and against the arrays themselves."""

import dataclasses

import jax
import pytest
from models import VARIANTS, variant

from jaxlm.analysis.costs import (
    activation_bytes_per_sequence,
    cache_bytes,
    cache_bytes_per_token,
    forward_flops_per_token,
    optimizer_bytes,
    parameter_table,
)
from jaxlm.config import ModelConfig, OptimConfig
from jaxlm.config.presets import preset
from jaxlm.model.build import build_model, init_params
from jaxlm.model.cache import init_cache
from jaxlm.optim import build_optimizer


def test_flops_of_a_transformer_are_two_a_weight_and_token_and_those_of_its_attention():
    cfg = ModelConfig(vocab_size=11, max_seq_len=7, num_layers=3, embed_dim=24, num_heads=4, mlp_dim=20)
    products = 3 * (4 * 24 * 24 + 2 * 24 * 20) + 24 * 11
    assert forward_flops_per_token(cfg) == 2 * products + 3 * 2 * 2 * 7 * 24
    for fields in ({"scan_layers": True}, {"remat": True}, {"dtype": "bfloat16"}):  # a scanned body counts once a layer
        assert forward_flops_per_token(dataclasses.replace(cfg, **fields)) == 2 * products + 3 * 2 * 2 * 7 * 24


def test_flops_of_the_other_families():
    sizes = {"vocab_size": 11, "max_seq_len": 7}
    assert forward_flops_per_token(ModelConfig(**sizes, family="bigram")) == 0
    assert forward_flops_per_token(ModelConfig(**sizes, family="embedding_bigram", embed_dim=5)) == 2 * 5 * 11
    lstm = ModelConfig(**sizes, family="recurrent", cell="lstm", embed_dim=5, num_layers=2)
    assert forward_flops_per_token(lstm) == 2 * (2 * 8 * 5 * 5) + 2 * 5 * 11


def test_local_attention_costs_fewer_operations_on_a_long_context():
    cfg = variant(max_seq_len=256, window=16)
    full, local = (dataclasses.replace(cfg, attention_impl=impl) for impl in ("reference", "local"))
    assert forward_flops_per_token(local) < 0.4 * forward_flops_per_token(full)


@pytest.mark.parametrize(("length", "window", "batched"), [(127, 8, False), (128, 43, False), (129, 43, True)])
def test_auto_cuts_equal_blocks_from_three_windows_and_128_tokens_on(length, window, batched):
    cfg = variant(max_seq_len=length, window=window, num_layers=1)
    flops = {
        impl: forward_flops_per_token(dataclasses.replace(cfg, attention_impl=impl))
        for impl in ("auto", "reference", "local")
    }
    assert flops["auto"] < flops["reference"]
    assert (flops["auto"] == flops["local"]) == batched


@pytest.mark.parametrize("name", ["rope", "summed_scores", "wide_values", "window_pattern", "lstm", "bigram"])
def test_cache_bytes_are_those_of_the_arrays(name):
    cfg = VARIANTS[name]
    for capacity in (1, 2, 7):
        arrays = jax.tree.leaves(init_cache(cfg, 1, capacity))
        assert cache_bytes(cfg, capacity) == sum(array.nbytes for array in arrays)
    grown = {"rope": 2 * (2 * 2 * 6 * 4 + 4), "wide_values": 2 * (2 * (6 + 7) * 4 + 4), "lstm": 0, "bigram": 0}
    if name in grown:  # L layers of K heads of H and Hv features, and a position
        assert cache_bytes_per_token(cfg) == grown[name]


def test_the_cache_shrinks_exactly_with_the_heads_it_holds():
    sizes = [cache_bytes(variant(num_kv_heads=k, num_layers=1), 7) for k in (1, 2, 4)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


@pytest.mark.slow
def test_activations_shrink_with_recomputation_and_grow_with_the_depth():
    def kept(**fields):
        return activation_bytes_per_sequence(variant(**fields))

    assert kept(remat=True) < 0.5 * kept()
    assert kept(num_layers=4) - kept(num_layers=3) == kept(num_layers=3) - kept(num_layers=2) > 7 * 24 * 4
    assert kept(remat=True, num_layers=4) - kept(remat=True, num_layers=3) >= 7 * 24 * 4  # each block's input


def test_estimates_of_a_large_preset_make_no_arrays():
    cfg = preset("gpt2-124m").model
    products = 12 * 12 * 768 * 768 + 768 * 50257
    in_blocks = (1 + 2 + 3 + 4) / 4**2  # of all scores
    assert forward_flops_per_token(cfg) == 2 * products + in_blocks * 12 * 4 * 1024 * 768
    assert cache_bytes_per_token(cfg) == 12 * (2 * 768 * 4 + 4)


def test_optimizer_bytes_are_those_of_the_arrays():
    cfg = preset("tiny").model
    found = optimizer_bytes(cfg)
    params = init_params(build_model(cfg), jax.random.key(0))

    @jax.jit  # compiled as one program
    def states(params):
        split = {label: label.split() for label in found}
        configs = {label: OptimConfig(name=name, arguments=tuple(rest)) for label, (name, *rest) in split.items()}
        return {label: build_optimizer(optim, 1000).init(params) for label, optim in configs.items()}

    for label, state in states(params).items():
        assert found[label] == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found["adamw"] == 2 * 4 * numbers + 2 * 4  # two moments; the steps taken, of Adam and of the schedule


def test_optimizer_bytes_of_a_large_preset_make_no_arrays():
    """124,439,808 parameters, of which 12 x (4 x 768 x 768 + 2 x 768 x 3072) in kernels of 12 x 6,912 outputs.

    What is not in kernels is 39,505,152 numbers. Adafactor keeps 12 x (4 x 1,536 + 2 x 3,840) rows and columns of
    kernels, 51,025 and 1,792 of the two tables and 121,344 numbers of biases and norms. The rest is counters.
    """
    assert optimizer_bytes(preset("gpt2-124m").model) == {
        "sgd": 8,
        "sgd momentum=0.9": 4 * 124_439_808 + 8,
        "adamw": 8 * 124_439_808 + 8,
        "adamw mu_dtype=bfloat16": 6 * 124_439_808 + 8,
        "adamsn": 4 * 124_439_808 + 4 * (39_505_152 + 110_592) + 8,
        "adafactor": 4 * (165_888 + 51_025 + 1_792 + 121_344) + 12,
        "adafactor momentum=0.9": 4 * 124_439_808 + 4 * (165_888 + 51_025 + 1_792 + 121_344) + 12,
    }


def test_the_parameter_table_holds_every_array_and_block_2_before_block_10():
    cfg = variant(num_layers=12)
    table = parameter_table(cfg)
    params = init_params(build_model(cfg), jax.random.key(0))
    arrays = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(params)}
    assert {path: shape for path, shape, _ in table} == {path: array.shape for path, array in arrays.items()}
    assert sum(count for *_, count in table) == sum(array.size for array in arrays.values())
    blocks = [path.split("/")[0] for path, *_ in table if path.startswith("block_")]
    assert list(dict.fromkeys(blocks)) == [f"block_{i}" for i in range(12)]
