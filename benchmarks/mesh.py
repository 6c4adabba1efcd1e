"""A training step on a mesh: what its program sends beside the formula, and its time beside that of one device.

    python benchmarks/mesh.py [--rounds 9] [--no-time] [--topology v5e:2x4]

Eight virtual devices of one CPU share its cores, so the ratio of times is what the splitting costs: copies between
devices, and products of smaller pieces. Steps take turns, after two of warm-up each. With --topology the program is
compiled for that TPU instead, which needs no TPU, only the package libtpu, and has no times; products are then in
float32, which is not a TPU's default. Bytes are those that each device sends in a step, in rings.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is there to be asked

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.analysis.communication import collectives, sent_by_axis
from jaxlm.analysis.mesh_step import compiled_step
from jaxlm.analysis.mesh_traffic import sent_over, step_traffic
from jaxlm.config import ExperimentConfig, ModelConfig, TrainConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.sharding.layout import optimizer_shardings
from jaxlm.training.step import TrainState

AXES = ("data", "fsdp", "tensor")
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8))

CONFIG = ExperimentConfig(
    preset="mesh",
    model=ModelConfig(
        vocab_size=512,
        max_seq_len=64,
        num_layers=2,
        embed_dim=128,
        num_heads=8,
        mlp_dim=512,
        norm="rmsnorm",
        use_bias=False,
        position="rope",
    ),
    train=TrainConfig(batch_size=32, steps=200),
)


def stepper(mesh: Mesh, program: jax.stages.Compiled) -> Callable[[], float]:
    """A function that takes a step and returns its seconds."""
    sizes, windows = CONFIG.model, np.zeros((CONFIG.train.batch_size, CONFIG.model.max_seq_len + 1), np.int32)
    windows[:] = np.random.default_rng(0).integers(0, sizes.vocab_size, windows.shape)
    with jax.set_mesh(mesh):
        params = init_params(build_model(sizes), jax.random.key(0))
        tx = build_optimizer(CONFIG.optim, CONFIG.train.steps)
        opt_state = jax.jit(tx.init, out_shardings=optimizer_shardings(tx, params))(params)
    step = jax.device_put(np.int32(0), NamedSharding(mesh, PartitionSpec()))
    state: Any = TrainState(params, opt_state, step)
    rows = jax.device_put(windows, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None)))

    def take() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, rows))
        return time.perf_counter() - begun

    return take


def shown(sent: dict[str, int]) -> str:
    """Bytes by axes, without those of single numbers."""
    return ", ".join(f"{axes} {size:,}" for axes, size in sent.items() if size >= 10_000) or "nothing"


def main() -> None:
    """Prints a row for each mesh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-time", action="store_true", help="only count")
    parser.add_argument("--topology", help="compile for this TPU, such as v5e:2x4")
    arguments = parser.parse_args()
    devices, what = jax.devices(), f"8 virtual devices of {os.cpu_count()} cores"
    if arguments.topology:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
        what = f"{len(devices)} x {devices[0].device_kind} ({arguments.topology}), compiled ahead of time"
    print(f"jax {jax.__version__}, {what}; load average {os.getloadavg()[0]:.1f}")

    def program(shape: tuple[int, ...]) -> tuple[Mesh, jax.stages.Compiled]:
        own = np.array(devices)[: int(np.prod(shape))].reshape(shape)
        mesh = Mesh(own, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        with jax.default_matmul_precision("float32"):
            return mesh, compiled_step(CONFIG, mesh)

    timed = not (arguments.no_time or arguments.topology)
    alone = stepper(*program((1, 1, 1))) if timed else None
    for shape in MESHES:
        mesh, compiled = program(shape)
        sizes = dict(zip(AXES, shape, strict=True))
        counted = sent_by_axis(collectives(compiled.as_text(), sizes))
        formula = sent_over(step_traffic(CONFIG, sizes))
        line = f"{' x '.join(map(str, shape))}: counted {shown(counted)}; formula {shown(formula)}"
        if alone is not None:
            together = stepper(mesh, compiled)
            for take in (alone, alone, together, together):
                take()
            rounds = [(alone(), together()) for _ in range(arguments.rounds)]
            one, eight = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
            ratio = statistics.median(b / a for a, b in rounds)
            line += f"; 1 device {one:.1f} ms, 8 devices {eight:.1f} ms, {ratio:.2f} times as long"
        print(line, flush=True)


if __name__ == "__main__":
    main()
