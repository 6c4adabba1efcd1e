"""The plan beside real arrays and compiled steps on eight virtual devices: the bytes on a device, the bytes sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.analysis.communication import sent_in_a_ring

MEASURE = """
import dataclasses, json, sys
import jax
from jax.sharding import AxisType
from jaxlm.analysis.communication import collectives, sent_by_axis
from jaxlm.analysis.mesh_memory import device_cache, device_state
from jaxlm.analysis.mesh_step import compiled_step
from jaxlm.analysis.mesh_traffic import step_traffic
from jaxlm.config import ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.model.cache import init_cache
from jaxlm.optim import build_optimizer
from jaxlm.sharding.layout import optimizer_shardings

AXES = ("data", "fsdp", "tensor")
model = ModelConfig(
    vocab_size=64, max_seq_len=8, num_layers=1, embed_dim=32, num_heads=8, mlp_dim=64, norm="rmsnorm", use_bias=False,
    position="rope",
)
config = ExperimentConfig(preset="small", model=model, train=TrainConfig(batch_size=16, steps=200))
found = {}
for shape in json.loads(sys.argv[1]):
    sizes = dict(zip(AXES, shape))
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    counted = sent_by_axis(collectives(compiled_step(config, mesh).as_text(), sizes))
    terms = [term._asdict() for term in step_traffic(config, sizes)]
    stored = {}
    for name in json.loads(sys.argv[2]):
        own = dataclasses.replace(config, optim=OptimConfig(name=name))
        with jax.set_mesh(mesh):
            params = init_params(build_model(model), jax.random.key(0))
            tx = build_optimizer(own.optim, 200)
            state = jax.jit(tx.init, out_shardings=optimizer_shardings(tx, params))(params)
        shards = [[leaf.addressable_shards[3] for leaf in jax.tree.leaves(tree)] for tree in (params, state)]
        real = [sum(shard.data.nbytes for shard in part) for part in shards]
        planned = device_state(own, sizes)
        stored[name] = [real, [planned.parameters, planned.optimizer_state]]
    with jax.set_mesh(mesh):
        cache = jax.tree.leaves(jax.jit(lambda: init_cache(model, 16, 8))())
    rows = 16 // (sizes["data"] * sizes["fsdp"])
    real = sum(leaf.addressable_shards[3].data.nbytes for leaf in cache)
    stored["cache"] = [real, rows * device_cache(model, sizes) + 4 * (16 - rows)]  # next positions are whole
    found["x".join(map(str, shape))] = {"counted": counted, "terms": terms, "stored": stored}
print(json.dumps(found))
"""


def measured(meshes, optimizers):
    """What each mesh stores and sends, measured and planned, in a process with eight devices."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    arguments = [sys.executable, "-c", MEASURE, json.dumps(meshes), json.dumps(optimizers)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found):
    """Bytes on a device are equal; bytes sent are those of the formulas but for what XLA:CPU does otherwise."""
    for name, one in found.items():
        for optimizer, (real, planned) in one["stored"].items():
            assert real == planned, (name, optimizer)
        counted, sent = one["counted"], {}
        for term in one["terms"]:
            twice = 2 if term["kind"] == "reduce-scatter" else 1  # XLA:CPU reduces all, then keeps a part
            three = 3 if term["name"] == "gradient of the input of attention" else 1  # of queries, keys, values apart
            sent[term["axes"]] = sent.get(term["axes"], 0) + twice * three * term["sent"]
        assert set(sent) == set(counted), name
        _, fsdp, tensor = map(int, name.split("x"))
        table = sent_in_a_ring(
            "all-gather", 4 * 64 * 32 // tensor, fsdp
        )  # XLA gathers the gradient of the lookups, too
        for axes, planned in sent.items():
            surplus = counted[axes] - planned - (table if axes == "fsdp" else 0)
            assert 0 <= surplus < 300, (name, axes)  # the norm of the gradient and other single numbers


def test_bytes_on_a_device_and_bytes_sent_are_those_of_the_plan():
    check(measured([(2, 2, 2)], ["adamw", "adafactor"]))


@pytest.mark.slow
def test_they_are_on_every_mesh_and_for_every_kind_of_optimizer():
    meshes = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (1, 1, 8)]
    check(measured(meshes, ["sgd", "adamw", "adamsn", "adafactor", "lion"]))
