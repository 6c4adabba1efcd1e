"""A training step compiled for a mesh, from shapes alone: the program whose communication a plan is compared with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import ExperimentConfig
from jaxlm.model.build import build_model, init_params, param_specs
from jaxlm.optim import build_optimizer
from jaxlm.sharding.layout import optimizer_shardings, shardings
from jaxlm.training.step import TrainState, train_step


def abstract_state(config: ExperimentConfig, mesh: Mesh) -> TrainState:
    """The shapes of the state of training, each with its sharding on the mesh."""
    model = build_model(config.model)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    specs = param_specs(model, dict(mesh.shape))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf, spec: placed(leaf, NamedSharding(mesh, spec)), params, specs)
    tx = build_optimizer(config.optim, config.train.steps)
    opt_state = jax.tree.map(placed, jax.eval_shape(tx.init, params), optimizer_shardings(tx, params))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return TrainState(params, opt_state, step)


def compiled_step(config: ExperimentConfig, mesh: Mesh) -> jax.stages.Compiled:
    """`training.step.train_step` compiled for a mesh; nothing is computed.

    The devices may be those of a topology that this machine does not have (`jax.experimental.topologies`).
    """
    model, tx = build_model(config.model), build_optimizer(config.optim, config.train.steps)
    state = abstract_state(config, mesh)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    shape = config.train.batch_size, config.model.max_seq_len + 1
    windows = jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)

    def step(state: TrainState, windows: jax.Array):
        return train_step(state, windows, model, tx, config.train.seed, config.train.grad_accum)

    out = shardings(state), NamedSharding(mesh, PartitionSpec())
    program = jax.jit(step, donate_argnums=0, out_shardings=out)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # jax.set_mesh would run small programs on the devices
        lowered = program.lower(state, windows)
    return lowered.compile()
