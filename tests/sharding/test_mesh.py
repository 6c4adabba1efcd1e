"""Training and decoding on meshes of eight virtual devices, compared with one device."""

import json

import jax
import numpy as np
import on_mesh
import pytest

from jaxlm.config import MeshConfig
from jaxlm.model.build import build_model, init_params, param_specs
from jaxlm.ops import partition
from jaxlm.ops.partition import partition_spec
from jaxlm.run.attention_maps import attention_maps
from jaxlm.sharding.mesh import make_mesh


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What the quick check in a process of its own finds."""
    return on_mesh.run("quick", str(tmp_path_factory.mktemp("checkpoints")))


def test_losses_on_a_mesh_are_those_of_one_device(small):
    """Windows, grouped queries, scanned and recomputed layers, two kinds of dropout, micro-batches: all at once."""
    assert small["losses"] < 1e-5


def test_a_checkpoint_of_one_mesh_is_bitwise_the_same_on_others(small):
    assert small["checkpoint"] == {"(1, 1, 1)": [True, 1], "(8, 1, 1)": [True, 8]}


def test_rows_decode_on_a_mesh_as_on_one_device(small):
    assert small["tokens"]
    assert small["distinct"] > 5
    held, whole = small["cache"]
    assert held == whole // 8


def test_bytes_a_device_fall_as_the_mesh_says(small):
    assert set(small["params"]) == set(on_mesh.MODELS)
    for model, params in small["params"].items():
        for path, (held, whole) in params.items():
            assert held == expected_bytes(path, whole, (2, 2, 2)), (model, path)
    held, whole = small["opt_state"]
    assert held < 0.4 * whole, "the moments with them, also AdamSN's, which are one number for many"


@pytest.mark.slow
def test_a_missing_sum_over_devices_changes_the_losses():
    moved = on_mesh.run("planted")
    assert moved.pop("nothing missing") < 1e-5
    assert min(moved.values()) > 2e-5, moved


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("model", list(on_mesh.MODELS))
def test_losses_of_20_steps_of_every_optimizer_on_every_mesh(model, x64):
    worst = on_mesh.run("compare", model, ",".join(on_mesh.OPTIMIZERS), json.dumps(on_mesh.MESHES), x64=x64)
    assert len(worst) == len(on_mesh.OPTIMIZERS) * len(on_mesh.MESHES)
    assert max(worst.values()) < (1e-10 if x64 else 1e-5), worst


def expected_bytes(path, whole, shape):
    """By hand: matrices are split by fsdp and tensor, biases of split features by tensor, all else is whole."""
    _, fsdp, tensor = shape
    if path.endswith(("kernel", "embedding", "table")):
        return whole // (fsdp * tensor)
    features_are_split = any(part in path for part in ("query/", "key/", "value/", "gate/", "up/"))
    if path.endswith("bias") and features_are_split:
        return whole // tensor
    return whole


@pytest.mark.slow
def test_bytes_a_device_of_three_optimizers():
    """Parameters one by one; the moments of AdamW with them; AdamSN's and Adafactor's are a part of them."""
    found = on_mesh.run("sizes", "transformer", "adamw,adamsn,adafactor", "[[1, 1, 1], [2, 2, 2], [1, 2, 4]]")
    for shape in ((2, 2, 2), (1, 2, 4)):
        for name in ("adamw", "adamsn", "adafactor"):
            params = found[f"transformer {name} {shape}"]["params"]
            assert len(params) > 20
            for path, (held, whole) in params.items():
                assert held == expected_bytes(path, whole, shape), (path, shape)
        adamw = found[f"transformer adamw {shape}"]
        assert adamw["opt_state"] - 2 * sum(held for held, _ in adamw["params"].values()) < 50, "and three counters"
        for name in ("adamsn", "adafactor"):
            one = found[f"transformer {name} (1, 1, 1)"]["opt_state"]
            assert found[f"transformer {name} {shape}"]["opt_state"] < 0.7 * one, name


RULES = {
    "transformer": ["embed", "table_embed", "heads", "kv_heads", "mlp"],
    "recurrent": ["hidden", "vocab"],
    "bigram": ["vocab_rows", "vocab"],
}


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name, rules in RULES.items() for rule in rules])
def test_without_one_rule_a_device_holds_more(name, rule, monkeypatch):
    """So the test of the bytes fails if a rule is dropped."""
    model, sizes = build_model(on_mesh.config(name)), {"data": 2, "fsdp": 2, "tensor": 2}
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def held() -> float:
        specs = param_specs(model, sizes)
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True)
        return sum(leaf.size / 2 ** len(jax.tree.leaves(tuple(spec))) for leaf, spec in pairs)

    before = held()
    monkeypatch.setitem(partition.RULES, rule, ())
    assert held() > before


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_on_others(tmp_path):
    results = on_mesh.run("checkpoints", str(tmp_path), "[[1, 1, 1], [8, 1, 1]]")
    assert [result["devices"] for result in results.values()] == [1, 8]
    assert all(result["bitwise"] and result["losses"] < 1e-5 for result in results.values()), results


@pytest.mark.slow
def test_attention_in_blocks_keeps_its_memory_bound_on_each_device():
    """All scores of a device's rows and heads at once would take 8 x 8 x 2048^2 x 4 / 8 = 134 MB."""
    temporary = on_mesh.run("memory", json.dumps([(1, 1, 1), *on_mesh.MESHES]))
    for kind in ("all keys", "window", "dropout"):
        whole = temporary[f"{kind} (1, 1, 1)"]
        for shape in on_mesh.MESHES:
            assert temporary[f"{kind} {shape}"] < min(0.6 * whole, 100e6), (kind, shape, temporary)


@pytest.mark.slow
def test_32_rows_decode_on_eight_devices_as_on_one():
    results = on_mesh.run("decode", json.dumps([(1, 1, 1), *on_mesh.MESHES]), x64=True)
    assert all(result["equal"] and result["log_probs"] < 1e-10 for result in results.values()), results
    assert all(result["distinct"] > 20 for result in results.values()), "texts that say something"
    for kind in ("scanned", "learned"):
        whole = results[f"{kind} (1, 1, 1)"]["cache_bytes"]
        assert all(results[f"{kind} {shape}"]["cache_bytes"] == whole // 8 for shape in on_mesh.MESHES)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"data": 2}, "mesh.data = 2 needs 2 devices and JAX has 1 .cpu.: give a smaller mesh; JAX_NUM_CPU_DEVICES=2"),
        ({"data": -1, "tensor": 2}, "2 does not divide the devices that JAX has, 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(cfg, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(MeshConfig(**cfg))


@pytest.mark.parametrize(("platforms", "error"), [("cuda", AssertionError()), ("tpu", RuntimeError("no TPU"))])
def test_without_devices_the_refusal_names_what_was_asked_for(platforms, error, monkeypatch):
    """JAX raises an AssertionError without a word where CUDA is missing."""

    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(ValueError, match=rf"JAX finds no devices .JAX_PLATFORMS={platforms}: .*; change JAX_PLAT"):
        make_mesh(MeshConfig(data=2))


def test_attention_maps_are_refused_on_a_mesh():
    model = build_model(on_mesh.config("transformer"))
    with jax.set_mesh(jax.make_mesh((1, 1, 1), partition.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)):
        params = init_params(model, jax.random.key(0))
        with pytest.raises(ValueError, match="computed on one device: leave `jaxlm.use_mesh` out"):
            attention_maps(model, params, np.zeros((1, 3), np.int32))


def test_a_mesh_of_other_axes_changes_nothing():
    model, tokens = build_model(on_mesh.config("transformer")), np.zeros((2, 3), np.int32)
    params = init_params(model, jax.random.key(0))
    expected, _ = model.apply({"params": params}, tokens)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        logits, _ = model.apply({"params": params}, tokens)
        again = init_params(model, jax.random.key(0))
    assert (np.asarray(logits) == np.asarray(expected)).all()
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_no_mesh_for_one_device():
    assert make_mesh(MeshConfig()) is None
    assert make_mesh(MeshConfig(data=-1)) is None


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("embed", "heads"), (6, 8), ("fsdp", "tensor")),
        (("vocab", "table_embed"), (64, 6), ("tensor", "fsdp")),
        (("vocab", "table_embed"), (65, 8), (None, ("fsdp", "tensor"))),
        (("batch", None, "vocab"), (12, 7, 65), (("data", "fsdp"), None, None)),
        (("batch", None), (5, 7), (None, None)),
    ],
)
def test_partition_of_an_array(names, shape, spec):
    assert tuple(partition_spec(names, shape, {"data": 3, "fsdp": 2, "tensor": 4})) == spec


def test_a_size_that_a_mesh_does_not_divide_is_refused_with_both():
    with pytest.raises(ValueError, match=r"mesh.tensor = 4 does not divide num_kv_heads = 6: change the mesh"):
        partition_spec(("embed", "kv_heads"), (8, 6), {"data": 1, "fsdp": 2, "tensor": 4})
