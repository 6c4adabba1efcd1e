"""What sliding-window attention costs over the length and the window: in blocks, and with the mask of all keys."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention import attend
from jaxlm.ops.blocked_attention import blocked_attend
from jaxlm.ops.masks import attention_mask


def gradient(length: int, window: int, local: bool, batch: int = 1, heads: int = 1) -> tuple[Callable[[], None], int]:
    """A call of the compiled forward and backward pass on heads of 64, and the bytes its program needs.

    Args:
      local: in blocks; otherwise with the mask.
    """
    positions = jnp.arange(length)[None]

    def attention(q, k, v):
        if local:
            return blocked_attend(q, k, v, positions, positions, window)
        return attend(q, k, v, attention_mask(positions, positions, window))

    q, k, v, weight = (jax.random.normal(jax.random.key(i), (batch, length, heads, 64)) for i in range(4))
    function = jax.jit(jax.grad(lambda q, k, v: (attention(q, k, v) * weight).sum(), (0, 1, 2)))
    compiled = function.lower(q, k, v).compile()
    return lambda: jax.block_until_ready(compiled(q, k, v)), compiled_bytes(compiled)


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program of XLA needs: arguments, results and temporaries, donated arguments once."""
    memory: Any = compiled.memory_analysis()
    reserved = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(reserved - memory.alias_size_in_bytes)


def median_seconds(call: Callable[[], None], rounds: int) -> float:
    """Of consecutive calls after two to warm up. Not in turn: gigabytes of the one would empty the other's caches."""
    times = []
    for i in range(rounds + 2):
        started = time.perf_counter()
        call()
        if i >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def exponent(lengths: list[int], values: list[float]) -> float:
    """The slope of log(value) over log(length): the power with which the value grows."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])
