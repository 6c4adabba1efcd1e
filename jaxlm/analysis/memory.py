"""What memory training takes, as its compiled programs say, beside the sum of what must live at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.analysis.costs import activation_bytes_per_sequence
from jaxlm.config import ExperimentConfig
from jaxlm.data.batches import TokenStream
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.evaluate import eval_batch_size, eval_groups, make_sums
from jaxlm.training.loop import make_chunk
from jaxlm.training.step import TrainState
from jaxlm.types import tree_bytes


class Memory(NamedTuple):
    """The memory of a compiled program, in bytes."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    """Of the outputs: written over arguments that were donated."""

    @property
    def peak(self) -> int:
        """The most that the program needs at once, its arguments included."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


class TrainingMemory(NamedTuple):
    """What training takes, in bytes, without the text."""

    step: Memory
    """The compiled loop over training steps."""
    evaluation: Memory
    """The evaluation of one call's windows, as many as a long split has."""
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    """What automatic differentiation keeps of one micro-batch; an estimate without dropout."""

    @property
    def must_live(self) -> int:
        """The sum of the last four."""
        return self.parameters + self.gradients + self.optimizer_state + self.activations


def compiled_memory(compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program.

    Raises:
      NotImplementedError: this backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise NotImplementedError(f"{jax.default_backend()} does not say how much memory a program takes")
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


def training_memory(config: ExperimentConfig) -> TrainingMemory:
    """Compiles the training loop and the evaluation of a config on shapes; nothing is computed.

    Takes as long as the compilations of `jaxlm train`, and keeps nothing in memory.
    """
    model, cfg = build_model(config.model), config.train
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    tx = build_optimizer(config.optim, cfg.steps, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(tx.init, params), step)
    length = config.model.max_seq_len
    text = TokenStream(jax.ShapeDtypeStruct((2 * length + 1,), jnp.uint8), length)
    chunk: Any = make_chunk(model, tx, cfg)
    evaluated = eval_groups(config, params), eval_batch_size(config)
    windows = jax.ShapeDtypeStruct((*evaluated, length + 1), np.uint8)
    weights = jax.ShapeDtypeStruct((*evaluated, length), np.float32)
    sums: Any = make_sums(model)
    return TrainingMemory(
        step=compiled_memory(chunk.lower(state, text, 1).compile()),
        evaluation=compiled_memory(sums.lower(params, windows, weights).compile()),
        parameters=tree_bytes(params),
        gradients=tree_bytes(params),
        optimizer_state=tree_bytes(state.opt_state),
        activations=activation_bytes_per_sequence(config.model) * (cfg.batch_size // cfg.grad_accum),
    )
