"""A training step planned on paper for a mesh of accelerators: does it fit, how long does it take, what would help?"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.analysis.accelerators import Accelerator
from jaxlm.analysis.costs import forward_flops_per_token
from jaxlm.analysis.mesh_memory import (
    DeviceMemory,
    MeshShape,
    device_cache,
    device_memory,
    local_model,
)
from jaxlm.analysis.mesh_traffic import Term, sent_over, step_traffic
from jaxlm.config import ExperimentConfig, MeshConfig, ModelConfig
from jaxlm.errors import UserError
from jaxlm.sharding.layout import micro_batch_rows

AXES = ("data", "fsdp", "tensor")

EFFICIENCY = 0.4
"""The share of the peak at which products are assumed to run: what `gpt2-124m` in bfloat16 reached on one H200
(docs/performance.md)."""


class StepTime(NamedTuple):
    """Seconds of a training step, by a simple model (`step_time`)."""

    compute: float
    update: float
    communication: dict[str, float]
    """By axes."""

    @property
    def overlapped(self) -> float:
        """If all communication happens beside the products."""
        return max(self.compute, sum(self.communication.values())) + self.update

    @property
    def apart(self) -> float:
        """If none does."""
        return self.compute + sum(self.communication.values()) + self.update


class Plan(NamedTuple):
    """What a training step costs on a mesh."""

    mesh: dict[str, int]
    rows: int
    """Of a micro-batch on each device."""
    tokens: int
    """Of a step, on all devices together."""
    memory: DeviceMemory
    cache: int
    """Bytes of a row's cache for max_seq_len tokens on each device that holds a part of its heads."""
    traffic: list[Term]
    flops: int
    """Of a step on each device: products of the forward pass three times; layers four times with remat."""
    useful_flops: float
    """Of a step on all devices together, without what is computed again or on several devices: what MFU counts."""

    @property
    def devices(self) -> int:
        """The devices of the mesh."""
        return math.prod(self.mesh.values())


def planned_mesh(mesh: MeshConfig) -> dict[str, int]:
    """The sizes of the axes.

    Raises:
      UserError: one of them is the rest of the devices, of which a plan on paper has none.
    """
    sizes = {name: getattr(mesh, name) for name in AXES}
    for name, size in sizes.items():
        if size == -1:
            raise UserError(f"mesh.{name} = -1 is the rest of the devices, but a plan has no devices: give a number")
    return sizes


@functools.lru_cache(maxsize=64)  # what would help is asked for the same configs again
def _flops(cfg: ModelConfig) -> tuple[float, float]:
    """The FLOPs of a forward pass, a token: of all, and of the layers alone."""
    if cfg.family not in ("transformer", "recurrent"):
        return forward_flops_per_token(cfg), 0.0
    period = len(cfg.layer_period)
    one, two = (forward_flops_per_token(dataclasses.replace(cfg, num_layers=n * period)) for n in (1, 2))
    layers = (two - one) * cfg.num_layers / period
    return one - (two - one) + layers, layers


def make_plan(config: ExperimentConfig, mesh: MeshShape) -> Plan:
    """Plans a training step on a mesh; nothing is allocated, so the mesh may be larger than the machine.

    Raises:
      UserError: the mesh does not divide the batch or a size of the model.
    """
    rows, memory = (
        micro_batch_rows(config.train, mesh),
        device_memory(config, mesh),
    )  # which refuse what does not divide
    tokens = rows * config.train.grad_accum * config.model.max_seq_len  # of a device
    forward, layers = _flops(local_model(config.model, mesh))
    whole, _ = _flops(local_model(config.model, dict.fromkeys(AXES, 1)))
    return Plan(
        mesh=dict(mesh),
        rows=rows,
        tokens=config.train.batch_size * config.model.max_seq_len,
        memory=memory,
        cache=device_cache(config.model, mesh),
        traffic=step_traffic(config, mesh),
        flops=round(tokens * (3 * forward + (layers if config.model.remat else 0))),
        useful_flops=3 * whole * config.train.batch_size * config.model.max_seq_len,
    )


def step_time(plan: Plan, config: ExperimentConfig, on: Accelerator) -> StepTime:
    """How long a step takes.

    Products run at EFFICIENCY of the peak. The update reads gradients, parameters and optimizer state once and writes
    the last two, at the bandwidth of the memory. What is sent over some axes goes at the bandwidth of the links inside
    a node if each group lies in one; else at that of the network, times how many devices of the group share a node,
    because each has a network card of its own. Devices are numbered along tensor first, then fsdp, then data.

    Raises:
      UserError: no data sheet says how fast the products are, or the network between nodes.
    """
    peak = on.peak(config.model.dtype, config.train.matmul_precision)
    state = plan.memory.parameters + plan.memory.optimizer_state
    return StepTime(
        compute=plan.flops / (EFFICIENCY * peak),
        update=(2 * state + plan.memory.gradients) / on.memory_bandwidth,
        communication={axes: sent / _bandwidth(axes, plan.mesh, on) for axes, sent in sent_over(plan.traffic).items()},
    )


def utilisation(plan: Plan, config: ExperimentConfig, on: Accelerator, seconds: float) -> float:
    """Model FLOPs utilisation (MFU): the share of the peak that useful products take of a step of so many seconds.

    Source: Chowdhery et al. 2022 (PaLM), https://arxiv.org/abs/2204.02311, appendix B.
    """
    peak = on.peak(config.model.dtype, config.train.matmul_precision)
    return plan.useful_flops / (plan.devices * peak * seconds)


def _bandwidth(axes: str, mesh: MeshShape, on: Accelerator) -> float:
    """Bytes a second that each device of a group along these axes sends."""
    strides = {"data": mesh["fsdp"] * mesh["tensor"], "fsdp": mesh["tensor"], "tensor": 1}
    members = [0]
    for name in axes.split("+"):
        members = [place + i * strides[name] for place in members for i in range(mesh[name])]
    if max(members) < on.node:
        return on.link
    if on.network is None:
        raise UserError(
            f"{math.prod(mesh.values())} x {on.title} are more than the {on.node} that fast links connect, and no "
            "bandwidth beyond them is published: give a smaller mesh or another accelerator"
        )
    return min(on.link, on.network * sum(place < on.node for place in members))


class Change(NamedTuple):
    """A change of a config or mesh that lowers the memory of a device."""

    what: str
    """Such as "--model.remat"."""
    total: int
    """Bytes of a device after it."""


def changes_that_help(config: ExperimentConfig, plan: Plan) -> list[Change]:
    """What lowers the memory of a device, each change alone, the largest gain first."""
    found = []
    for what, changed, mesh in _candidates(config, plan):
        try:
            total = device_memory(changed, mesh).total
        except UserError:  # a size that this mesh does not divide
            continue
        if total < plan.memory.total:
            found.append(Change(what, total))
    return sorted(found, key=lambda change: change.total)


def _candidates(config: ExperimentConfig, plan: Plan) -> Iterator[tuple[str, ExperimentConfig, dict[str, int]]]:
    model, train, mesh = config.model, config.train, plan.mesh
    if not model.remat and model.family in ("transformer", "recurrent"):
        yield "--model.remat", dataclasses.replace(config, model=dataclasses.replace(model, remat=True)), mesh
    if plan.rows > 1:
        accumulation = train.grad_accum * plan.rows
        changed = dataclasses.replace(config, train=dataclasses.replace(train, grad_accum=accumulation))
        yield f"--train.grad-accum {accumulation}", changed, mesh
    if mesh["data"] > 1:
        moved = mesh["data"] * mesh["fsdp"]
        yield f"--mesh.data 1 --mesh.fsdp {moved}", config, {**mesh, "data": 1, "fsdp": moved}
    for axis in ("fsdp", "tensor"):
        more = {**mesh, axis: 2 * mesh[axis]}
        yield f"--mesh.{axis} {more[axis]} (of {2 * plan.devices} devices)", config, more
