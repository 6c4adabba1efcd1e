"""What a training step will take, before anything is compiled: memory of each device, and floating-point operations."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from jax.sharding import AbstractMesh

from jaxlm.analysis.accelerators import accelerator_of
from jaxlm.analysis.costs import count_product_flops, plain_model
from jaxlm.analysis.free_memory import free_memory
from jaxlm.analysis.memory import compiled_memory
from jaxlm.analysis.mesh_memory import device_state, local_model
from jaxlm.config import ExperimentConfig, ModelConfig, TrainConfig
from jaxlm.data.batches import BatchSource, PaddedRows, Split, TokenStream
from jaxlm.errors import UserError
from jaxlm.model.build import init_params
from jaxlm.optim import build_optimizer
from jaxlm.sharding.layout import micro_batch_rows
from jaxlm.training.loop import block_steps
from jaxlm.training.step import TrainState, batch_loss
from jaxlm.types import tree_bytes

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}

CERTAIN = 1.5
"""How many times the free memory an estimate must be for a run to be refused before it is compiled. Estimates were 0.94
to 1.36 times what the compiler then asked for (docs/train.md)."""


CLOSE = 1.1
"""The compiled program says what it needs if so many times the estimate is more than what is free."""


class StepCost(NamedTuple):
    """What a training step takes on each device (bytes) and on all together (operations)."""

    state: int
    """Parameters, gradients, their totals over micro-batches, and the state of the optimizer."""
    activations: int
    """What a micro-batch keeps for its backward pass; an estimate."""
    batch: int
    """The windows of the whole batch, which a step cuts before its first micro-batch, and what comes with them."""
    rows: int
    """Of a micro-batch on each device."""
    flops: float
    """Floating-point operations of the products of a step, three times those of the forward pass; not what is computed
    again (model.remat) or on several devices: what MFU counts."""

    @property
    def memory(self) -> int:
        """Bytes in all, without the text."""
        return self.state + self.activations + self.batch


class _Trace(NamedTuple):
    """What the program of a forward pass says of a micro-batch."""

    kept: int
    """Bytes that the backward pass reads, besides the parameters."""
    flops: float


def step_cost(config: ExperimentConfig, mesh: Mapping[str, int], split: Split | None = None) -> StepCost:
    """What a training step takes, from the shapes in its program alone: a fraction of a second for a small model.

    The memory is what must live at once: XLA takes less where it fuses operations, and more for its own arrays. Without
    dropout.

    Args:
      mesh: the sizes of its axes; empty = one device.
      split: what is trained on; None = a stream in memory.

    Raises:
      UserError: the mesh does not divide the batch or a size of the model.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # the program of one device, also inside a mesh
        return _step_cost(config, mesh or ONE_DEVICE, split)


def _step_cost(config: ExperimentConfig, mesh: Mapping[str, int], data: Split | None) -> StepCost:
    cfg, train = config.model, config.train
    rows = micro_batch_rows(train, mesh)
    split = math.prod(mesh.values()) > 1
    local = local_model(cfg, mesh) if split else cfg
    params = _params(local)
    if split:
        on_device = device_state(config, mesh)
        own, optimizer, gathered = on_device.parameters, on_device.optimizer_state, on_device.weights_in_use
    else:
        optimizer = tree_bytes(jax.eval_shape(build_optimizer(config.optim, train.steps, params).init, params))
        own, gathered = tree_bytes(params), 0
    wide = np.promote_types(jnp.dtype(cfg.param_dtype), np.float32).itemsize / jnp.dtype(cfg.param_dtype).itemsize
    totals = round(wide * own) if train.grad_accum > 1 else 0
    found = _trace_layers(local, rows)
    whole = found.flops / rows if mesh["tensor"] == 1 else _trace_layers(cfg, 1).flops
    return StepCost(
        state=2 * own + totals + optimizer + gathered,
        activations=found.kept + _logits_bytes(local, rows),
        batch=rows * train.grad_accum * _window_bytes(config, data),
        rows=rows,
        flops=3 * whole * train.batch_size,
    )


def _trace_layers(cfg: ModelConfig, rows: int) -> _Trace:
    """`_trace`; of a deep model, from one and two periods of its layers, as each further one is alike."""
    period = len(cfg.layer_period)
    layered = cfg.family in ("transformer", "recurrent")
    if not layered or (cfg.num_layers <= 2 * period and not cfg.remat):
        return _trace(cfg, rows)
    plain = dataclasses.replace(cfg, remat=False)
    one, two = (_trace(dataclasses.replace(plain, num_layers=n * period), rows) for n in (1, 2))
    layer, periods = two.kept - one.kept, cfg.num_layers / period
    flops = one.flops + (periods - 1) * (two.flops - one.flops)
    if cfg.remat:  # each layer keeps its input; the one that is computed again, all
        inputs = rows * cfg.max_seq_len * cfg.embed_dim * jnp.dtype(cfg.dtype).itemsize
        return _Trace(round(one.kept - layer + layer / period + cfg.num_layers * inputs), flops)
    return _Trace(round(one.kept + (periods - 1) * layer), flops)


def _trace(cfg: ModelConfig, rows: int) -> _Trace:
    model, windows = plain_model(cfg), jax.ShapeDtypeStruct((rows, cfg.max_seq_len + 1), jnp.int32)
    program = jax.make_jaxpr(lambda p, w: jax.vjp(lambda p: batch_loss(p, model, w), p)[1])(_params(cfg), windows).jaxpr
    given = {id(variable) for variable in program.invars}  # parameters and windows, which are there anyway
    kept: dict[int, Any] = {id(out): out.aval for out in program.outvars if isinstance(out, Var)}
    bytes_kept = sum(aval.size * aval.dtype.itemsize for key, aval in kept.items() if key not in given)
    return _Trace(bytes_kept, count_product_flops(program))


@functools.lru_cache(maxsize=8)
def _params(cfg: ModelConfig):
    return jax.eval_shape(lambda: init_params(plain_model(cfg), jax.random.key(0)))


def _logits_bytes(cfg: ModelConfig, rows: int) -> int:
    """The gradient of the logits."""
    wide = np.promote_types(jnp.dtype(cfg.dtype), np.float32).itemsize
    return rows * cfg.max_seq_len * cfg.vocab_size * wide


def _window_bytes(config: ExperimentConfig, data: Split | None) -> int:
    """What a window takes from the beginning of a step to its end."""
    length = config.model.max_seq_len
    found = (length + 1) * np.dtype(np.int32).itemsize
    if isinstance(data, PaddedRows):  # the weights of its targets
        found += length * jax.dtypes.canonicalize_dtype(float).itemsize
    if isinstance(data, TokenStream) and data.is_mapped:  # cut for many steps, while those before are read
        found += 2 * block_steps(config.train) * (length + 1) * data.tokens.dtype.itemsize
    return found


def check_memory(cost: StepCost, train: TrainConfig) -> None:
    """Refuses a training step that needs far more memory than is free, before anything is compiled or allocated.

    Raises:
      UserError: the message has both numbers and a --train.grad-accum under which the batch would fit, if there is one.
    """
    free = free_memory()
    if free is None or cost.memory <= CERTAIN * free:
        return
    device = jax.local_devices()[0].device_kind
    raise UserError(
        f"a training step needs about {gigabytes(cost.memory)} and {device} has {gigabytes(free)} free "
        f"(batch_size = {train.batch_size}, grad_accum = {train.grad_accum}): {_fix(cost, train, free)}"
    )


def is_close(cost: StepCost) -> bool:
    """Whether a step may need more memory than is free on a CPU, whose system ends a process without a word then."""
    free = free_memory()
    return jax.default_backend() == "cpu" and free is not None and CLOSE * cost.memory > free


def check_compiled(chunk: Any, state: TrainState, source: BatchSource, stop: int) -> None:
    """Compiles the training loop and compares the memory that it needs besides its arguments with what is free.

    Raises:
      MemoryError: it needs more.
    """
    found, free = compiled_memory(chunk.lower(state, source, np.asarray(stop, np.int32)).compile()), free_memory()
    needed = found.peak - found.arguments
    if free is not None and needed > free:
        raise MemoryError(f"{needed} bytes of which {free} are free")


def _fix(cost: StepCost, train: TrainConfig, free: int) -> str:
    """What the user can do."""
    if cost.state > free:
        return f"parameters, gradients and optimizer alone take {gigabytes(cost.state)}, so give a smaller model"
    if cost.state + cost.batch > free:
        return f"the batch alone takes {gigabytes(cost.batch)}, so give a smaller --train.batch-size"
    # Rows of a micro-batch on each device.
    largest = int((free - cost.state - cost.batch) * cost.rows // cost.activations)
    all_rows = cost.rows * train.grad_accum
    parts = range(max(train.grad_accum, -(-all_rows // max(largest, 1))), all_rows + 1)
    fitting = next((n for n in parts if all_rows % n == 0 and all_rows // n <= largest), 0)
    if fitting:
        return f"give a smaller --train.batch-size, or --train.grad-accum {fitting}, which computes it in parts"
    return "not even one row fits, so give a smaller model or a shorter --model.max-seq-len"


def gigabytes(number: float) -> str:
    """Bytes for people: 1.2 GB, 34.5 MB."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def speed_fields(config: ExperimentConfig, flops: float, devices: int):
    """What a row says of the speed of computing, as a function of the seconds of a step.

    `mfu` (model FLOPs utilisation, a share of the peak) where the peak of the device is known; else `gflops_per_s`, of
    all devices together; nothing for a model without products.

    Args:
      flops: of a step, on all devices together.
    """
    kind = jax.devices()[0].device_kind
    known = accelerator_of(kind)
    try:
        peak = None if known is None else known.peak(config.model.dtype, config.train.matmul_precision)
    except UserError:  # no data sheet has one for this type
        peak = None

    def fields(seconds: float) -> dict[str, float]:
        if not flops:
            return {}
        if peak is None:
            return {"gflops_per_s": round(flops / seconds / 1e9, 3)}
        return {"mfu": round(flops / seconds / (devices * peak), 4)}

    return fields
