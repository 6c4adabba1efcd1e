"""What a decoding step of jaxlm costs alone, in one process: by the tokens so far, and attention by memory layout.

`benchmarks/decode.py` runs this with --figure and --layout.
"""

import itertools
import time
from collections.abc import Callable, Hashable
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from jaxlm.analysis.costs import cache_bytes, parameter_table

PROMPT, BIN = 16, 64
"""Tokens of the prompt, and of a point of the figure."""

LAYOUTS = ["BCKH BCKH", "BKCH BKCH", "BKHC BKCH", "BKHC BKHC"]
"""The axes of keys, and of values."""


def timed(calls: dict[Hashable, Callable[[], object]], rounds: int) -> dict[Hashable, list[float]]:
    """Seconds of each call: the first, which compiles, then one for each round; the calls take turns."""
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return times


def moved_bytes(cfg: jaxlm.ModelConfig, batch: int, tokens: int) -> int:
    """Bytes that a step must read: all float32 weights but the position table, and the tokens' keys and values."""
    weights = sum(count for path, _, count in parameter_table(cfg) if "position" not in path)
    return 4 * weights + batch * cache_bytes(cfg, tokens)


def bandwidth(cfg: jaxlm.ModelConfig, seconds_a_step: dict[int, float], tokens: int) -> None:
    """How fast NumPy copies memory, and a step of `generate` reads it, by batch; `tokens` are in the cache."""
    print("\ncopies by NumPy in one thread (read + written), and what a step of generate reads (weights, filled cache)")
    speeds = []
    for size in (200_000_000, moved_bytes(cfg, 0, 1)):
        source, target = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
        speeds.append(2 * size / min(timed({"copy": lambda s=source, t=target: np.copyto(t, s)}, 20)["copy"]))
        print(f"copy of {size / 1e6:.1f} MB: {speeds[-1] / 1e9:.1f} GB/s, best of 21")
    for batch, step in seconds_a_step.items():
        size = moved_bytes(cfg, batch, tokens)
        shares = " and ".join(f"{size / step / speed:.0%}" for speed in speeds)
        print(f"batch {batch}: {size / 1e6:.1f} MB a step, {size / step / 1e9:.1f} GB/s, {shares} of the copies")


def token_times(cfg: jaxlm.ModelConfig, batch: int, rounds: int) -> np.ndarray:
    """Milliseconds a token while `stream` fills the context: the mean over each BIN tokens after the first BIN."""
    model, prompt = jaxlm.build_model(cfg), np.zeros((batch, PROMPT), np.int32)
    params = jaxlm.init_params(model, jax.random.key(0))
    stamps: list[list[float]] = []

    def fill():
        new = jaxlm.stream(model, params, prompt, max_new_tokens=cfg.max_seq_len - PROMPT, key=jax.random.key(0))
        stamps.append([time.perf_counter() for n, _ in enumerate(new, PROMPT + 1) if n % BIN == 0])

    timed({"fill": fill}, rounds)
    return 1e3 * np.median(np.diff(stamps[1:]), axis=0) / BIN


def by_fill(path: str, tokens: int, window: int, batch: int, rounds: int) -> None:
    """The figure, and a table of its points on both sides of the powers of two."""
    from matplotlib.figure import Figure  # half a second to import: only when a plot is made

    from jaxlm.run.plots import BLUE, ORANGE, label_ends, style

    fills, columns, curves = np.arange(BIN, tokens - BIN + 1, BIN), [], []
    for name, span, color in (("global", None, BLUE), (f"window {window}", window, ORANGE)):
        cfg = jaxlm.ModelConfig(vocab_size=65, max_seq_len=tokens, position="rope", window=span)
        times = token_times(cfg, batch, rounds)
        sizes = np.array([moved_bytes(cfg, batch, int(n) + BIN // 2) for n in fills])
        curves += [
            (times, "-", f"{name}, measured", color),
            (times[0] * sizes / sizes[0], "--", f"{name}, by bytes read", color),
        ]
        columns += [times, sizes / 1e6]
    with style():
        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_subplot()
        for values, line, _, color in curves:
            axes.plot(fills + BIN / 2, values, line, color=color)
        axes.set(xlabel="tokens so far", ylabel=f"ms a step of {batch} rows", ylim=(0, None))
        figure.suptitle("Time of a decoding step (benchmarks/decode.py --figure)")
        axes.set_title(
            "dashed: the first value, scaled by the bytes that a step reads (weights and filled cache)",
            fontsize=8,
        )
        axes.grid(alpha=0.3)
        label_ends(axes, [(values[-1], name, color) for values, _, name, color in curves])
        figure.savefig(path)
    print(f"batch {batch}\ntokens so far  global ms      MB  window {window} ms      MB")
    for n, *values in zip(fills, *columns, strict=True):
        if any(i & (i - 1) == 0 for i in (n // BIN, n // BIN + 1)):
            print("{:>13} {:>10.3f} {:>7.1f} {:>14.3f} {:>7.1f}".format(f"{n} to {n + BIN}", *values))


def attention_steps(layout: str, batch: int, heads: tuple[int, int], dtype: str, cache_first: bool) -> Callable:
    """A compiled scan of 100 attention steps that read and write a cache of 256 slots; heads: K and G."""
    sizes, order = {"B": batch, "K": heads[0], "H": 32, "C": 256}, 1 if cache_first else -1
    key_axes, value_axes = layout.split()

    def product(cache, cache_axes, x, x_axes, out, **kind):
        return jnp.einsum(",".join((cache_axes, x_axes)[::order]) + f"->{out}", *(cache, x)[::order], **kind)

    def write(cache, cache_axes, new, slot):
        at = {"B": jnp.arange(batch)[:, None], "C": jnp.full((batch, 1 + (batch == 1)), slot)}  # why: LayerCache.write
        return cache.at[tuple(at.get(axis, slice(None)) for axis in cache_axes)].set(new[:, :, :, 0])

    def step(carry, slot):
        keys, values, queries = carry
        scores = product(keys, key_axes, queries, "BTKGH", "BKGTC", preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * sizes["H"] ** -0.5).astype(dtype)
        out = (product(values, value_axes, weights, "BKGTC", "BTKGH") + queries) / 2
        return (write(keys, key_axes, out, slot), write(values, value_axes, out, slot), out), None

    caches = [jnp.zeros([sizes[axis] for axis in cache_axes], dtype) for cache_axes in (key_axes, value_axes)]
    carry = *caches, jnp.ones((batch, 1, *heads, sizes["H"]), dtype)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(100))[0][-1])
    return lambda: jax.block_until_ready(scan(carry))


def by_layout(rounds: int) -> None:
    """Microseconds a step in each layout, in both orders of a product's operands."""
    print("microseconds a step, H 32, C 256; products of the cache and the rest / of the rest and the cache")
    print("    type   B K x G " + "".join(f"{axes:>23}" for axes in LAYOUTS))
    for dtype, batch, heads in itertools.product(("float32", "bfloat16"), (1, 32), ((4, 1), (2, 2))):
        calls: dict[Hashable, Callable[[], object]] = {}
        for axes, first in itertools.product(LAYOUTS, (True, False)):
            call = attention_steps(axes, batch, heads, dtype, first)
            try:
                call()
                calls[axes, first] = call
            except jax.errors.JaxRuntimeError as error:  # XLA:CPU lacks some products of bfloat16
                if "UNIMPLEMENTED" not in str(error):
                    raise
        shown = {name: f"{1e4 * median(times[1:]):.1f}" for name, times in timed(calls, rounds).items()}
        cells = [" / ".join(shown.get((axes, first), "not supported") for first in (True, False)) for axes in LAYOUTS]
        print(f"{dtype:>8} {batch:>3} {heads[0]} x {heads[1]} " + "".join(f"{c:>23}" for c in cells), flush=True)
