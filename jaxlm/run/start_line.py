"""The line with which a training starts: on what, of what, for how long, and what it will take."""

import math
import os

import jax

from jaxlm.analysis.expected import gigabytes
from jaxlm.analysis.free_memory import free_memory
from jaxlm.data.batches import TokenStream
from jaxlm.ops.partition import mesh_shape
from jaxlm.run.epochs import batches_per_epoch
from jaxlm.run.session import Session


def start_line(session: Session) -> str:
    """Device, parameters, tokens, batches an epoch, epochs of the run, expected memory, run folder.

    Tokens are all of the training split; of rows that stand alone, those that are predicted. An epoch is as many
    targets as the split has. The memory is an estimate, of each device.
    """
    split, train, free = session.corpus.train, session.config.train, free_memory()
    batches, devices = batches_per_epoch(session.config, split), math.prod(mesh_shape().values())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(session.state.params))
    done = f" from step {session.saved_step}" if session.saved_step else ""
    # A text is told by its length; of rows that stand alone, what is padding is no target.
    count, what = (len(split), "tokens") if isinstance(split, TokenStream) else (split.num_targets, "targets")
    return ", ".join(
        (
            f"{session.out}: {devices} x {_kind()}",
            f"{parameters:,} parameters",
            f"{count:,} training {what}",
            f"{_short(batches)} batches an epoch",
            f"{_short(train.steps / batches)} epochs in {train.steps:,} steps{done}",
            f"about {gigabytes(session.cost.memory)} of memory{' on each device' if devices > 1 else ''}"
            + ("" if free is None else f" ({gigabytes(free)} free)"),
        )
    )


def _short(number: float) -> str:
    """Two digits: after the point below 10, without zeros before them below 0.1; from 10 on a whole number."""
    return f"{number:.2g}" if number < 0.1 else f"{number:.2f}" if number < 10 else f"{number:,.0f}"


def _kind() -> str:
    """What JAX calls a device; of a CPU, whose kind says nothing, the cores that this process may use."""
    kind = jax.local_devices()[0].device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{kind} ({cores} cores)" if kind == "cpu" else kind
