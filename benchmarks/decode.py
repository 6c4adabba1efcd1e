"""Time of cached sampling: jaxlm against Hugging Face's GPT-2 and samplers without a cache.

All models have one size (4 layers, width 128, 4 heads, vocabulary 65, float32) and sample at temperature 1 without
filters. They take turns in one process, after a call that compiles and warms up; the ratios are the claim, not the
milliseconds. A cached step is (time of all tokens - time of 8) / the tokens between, so that the cost of a call drops
out; 8 is the smallest block that jaxlm scans. A naive step is the time of all steps / their number. With many rows only
some steps are timed: PyTorch's at lengths spread evenly, those of `generate_naive` at the end, since all of them cost
the same (it pads the context).

  python benchmarks/decode.py                           the table, and the share of the memory's bandwidth
  python benchmarks/decode.py --context                 cached and naive steps by context (rope, batch 1)
  python benchmarks/decode.py --figure docs/decode.png  cost of a token by the tokens so far, with and without window
  python benchmarks/decode.py --layout                  attention alone by memory layout of the cache
"""

import argparse
import importlib.util
import itertools
import os
import platform
import time
from collections.abc import Callable, Hashable
from functools import partial
from statistics import median
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import jaxlm
from jaxlm.analysis.costs import cache_bytes, parameter_table

GPT2 = jaxlm.ModelConfig(vocab_size=65, max_seq_len=256)
PROMPT, FEW, BIN = 16, 8, 64  # tokens: of a prompt, of the call that is taken off, of a point of the figure
LAYOUTS = ["BCKH BCKH", "BKCH BKCH", "BKHC BKCH", "BKHC BKHC"]  # axes of keys, of values


class Contestant(NamedTuple):
    """A sampler, and what each of its steps computes again."""

    sample: Callable[[int, int], object]  # length of the prompt, new tokens
    recomputes: Literal["nothing", "prefix", "context"]  # the context padded to its final length


def timed(calls: dict[Hashable, Callable[[], object]], rounds: int) -> dict[Hashable, list[float]]:
    """Seconds of each call: the first, which compiles, then one for each round; the calls take turns."""
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return times


def jaxlm_samplers(cfg: jaxlm.ModelConfig, batch: int) -> dict[str, Contestant]:
    """jaxlm's: cached, without a cache, and cached with tokens as they come."""
    model = jaxlm.build_model(cfg)
    params = jaxlm.init_params(model, jax.random.key(0))

    def sample(sampler, length, new):
        prompt = np.zeros((batch, length), np.int32)
        return list(sampler(model, params, prompt, max_new_tokens=new, key=jax.random.key(0)))

    return {
        "jaxlm generate": Contestant(partial(sample, jaxlm.generate), "nothing"),
        "jaxlm generate_naive": Contestant(partial(sample, jaxlm.generate_naive), "context"),
        "jaxlm stream": Contestant(partial(sample, jaxlm.stream), "nothing"),
    }


def torch_loop(forward: Callable[[torch.Tensor], torch.Tensor], batch: int, cached: bool) -> Contestant:
    """The sampler of every tutorial, on a function from tokens to logits; a cached one is fed only the new token."""

    @torch.no_grad()
    def sample(length, new):
        tokens = torch.zeros(batch, length, dtype=torch.long)
        for _ in range(new):
            logits = forward(tokens[:, -GPT2.max_seq_len :])[:, -1]
            token = torch.multinomial(torch.softmax(logits, dim=-1), 1)
            tokens = token if cached else torch.cat([tokens, token], dim=1)

    return Contestant(sample, "nothing" if cached else "prefix")


def hugging_face_samplers(batch: int) -> dict[str, Contestant]:
    """GPT-2 in eager PyTorch: its own `generate`, and a loop without a cache."""
    sizes = {"vocab_size": GPT2.vocab_size, "n_positions": GPT2.max_seq_len, "n_embd": GPT2.embed_dim}
    blocks = {"n_layer": GPT2.num_layers, "n_head": GPT2.num_heads, "activation_function": "gelu"}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes, **blocks, **off)
    model = transformers.GPT2LMHeadModel(config).eval()
    settings = {"do_sample": True, "top_k": 0, "use_cache": True, "pad_token_id": 0}

    @torch.no_grad()
    def sample(length, new):
        prompt = torch.zeros(batch, length, dtype=torch.long)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **settings)

    naive = torch_loop(lambda tokens: model(tokens, use_cache=False).logits, batch, cached=False)
    return {"Hugging Face generate": Contestant(sample, "nothing"), "Hugging Face naive": naive}


def torchref_samplers(batch: int) -> dict[str, Contestant]:
    """The plain PyTorch models of torchref with and without their cache; none where torchref is not installed."""
    if importlib.util.find_spec("torchref") is None:
        return {}
    model = importlib.import_module("torchref").build_model(GPT2).eval()

    def forward(tokens):
        if tokens.shape[1] > 1:  # a prompt
            model.clear_cache()
        return model(tokens, use_kv_cache=True)

    return {"torchref cached": torch_loop(forward, batch, True), "torchref naive": torch_loop(model, batch, False)}


def some_steps(contestant: Contestant, prompt: int, new: int, steps: int) -> None:
    """Runs `steps` of the `new` steps of a naive sampler, which stand for all."""
    if contestant.recomputes == "context":
        contestant.sample(prompt + new - steps, steps)
    else:
        for i in range(steps):
            contestant.sample(prompt + int((i + 0.5) * new / steps), 1)


def race(contestants: dict[str, Contestant], prompt: int, new: int, naive_steps: int, rounds: int) -> dict[str, tuple]:
    """Seconds: the first call less a later one, a call for one token, and a step in each round."""
    calls: dict[Hashable, Callable[[], object]] = {}
    for name, contestant in contestants.items():
        for n in (new, FEW, 1):
            calls[name, n] = partial(contestant.sample, prompt, n)
        if contestant.recomputes != "nothing":
            calls[name, new] = partial(some_steps, contestant, prompt, new, naive_steps)
    times, results = timed(calls, rounds), {}
    for name, contestant in contestants.items():
        (first, *later), (_, *few), (_, *one) = (times[name, n] for n in (new, FEW, 1))
        steps = [(a - b) / (new - FEW) for a, b in zip(later, few, strict=True)]
        if contestant.recomputes != "nothing":
            steps = [seconds / naive_steps for seconds in later]
        results[name] = first - median(later), median(one), steps
    return results


def moved_bytes(cfg: jaxlm.ModelConfig, batch: int, tokens: int) -> int:
    """Bytes that a step must read: all float32 weights but the position table, and the tokens' keys and values."""
    weights = sum(count for path, _, count in parameter_table(cfg) if "position" not in path)
    return 4 * weights + batch * cache_bytes(cfg, tokens)


def table(batches: list[int], naive_rows: int, rounds: int) -> None:
    """All samplers by batch size, then the bandwidth that a step of `generate` reaches."""
    new, ours = GPT2.max_seq_len - PROMPT, {}
    for batch in batches:
        contestants = jaxlm_samplers(GPT2, batch) | hugging_face_samplers(batch) | torchref_samplers(batch)
        naive_steps = min(new, max(1, naive_rows // batch))
        print(f"\nbatch {batch}, {new} tokens after {PROMPT}; naive ones take {naive_steps} of the steps", flush=True)
        print(f"{'':21} compiling s  first token ms  ms a step  (least to most)    times the time of jaxlm")
        for name, (compiling, first, steps) in race(contestants, PROMPT, new, naive_steps, rounds).items():
            ours.setdefault(batch, median(steps))
            times = f"{1e3 * median(steps):>9.3f}  {f'({1e3 * min(steps):.3f} to {1e3 * max(steps):.3f})':18}"
            print(f"{name:21} {compiling:>11.2f} {1e3 * first:>15.2f}  {times} {median(steps) / ours[batch]:>6.2f}")
    print("\ncopies by NumPy in one thread (read + written), and what a step of generate reads (weights, filled cache)")
    speeds = []
    for size in (200_000_000, moved_bytes(GPT2, 0, 1)):
        source, target = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
        speeds.append(2 * size / min(timed({"copy": partial(np.copyto, target, source)}, 20)["copy"]))
        print(f"copy of {size / 1e6:.1f} MB: {speeds[-1] / 1e9:.1f} GB/s, best of 21")
    for batch, step in ours.items():
        size = moved_bytes(GPT2, batch, PROMPT + new // 2)
        shares = " and ".join(f"{size / step / speed:.0%}" for speed in speeds)
        print(f"batch {batch}: {size / 1e6:.1f} MB a step, {size / step / 1e9:.1f} GB/s, {shares} of the copies")


def by_context(contexts: list[int], rounds: int) -> None:
    """Cached and naive steps from a prompt of 16 to a full context, batch 1."""
    print("context  naive steps  generate ms  generate_naive ms  times")
    for context in contexts:
        cfg = jaxlm.ModelConfig(vocab_size=65, max_seq_len=context, position="rope")
        new, naive_steps = context - PROMPT, min(context - PROMPT, 2**15 // context)
        results = race(jaxlm_samplers(cfg, 1), PROMPT, new, naive_steps, rounds)
        cached, naive = (1e3 * median(results[f"jaxlm {name}"][2]) for name in ("generate", "generate_naive"))
        print(f"{context:>7} {naive_steps:>12} {cached:>12.3f} {naive:>18.3f} {naive / cached:>6.1f}", flush=True)


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
    """The figure, and a table of its points on both sides of the powers of two, where the cache grows."""
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


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each, in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="of the table")
    parser.add_argument("--naive-rows", type=int, default=960, help="rows x steps of a naive sampler's round, at most")
    parser.add_argument("--context", type=int, nargs="*", help="contexts above 24; none given: 64 to 1024")
    parser.add_argument("--figure", help="path of the image")
    parser.add_argument("--tokens", type=int, default=4096, help="of the figure")
    parser.add_argument("--window", type=int, default=128, help="of the figure")
    parser.add_argument("--batch", type=int, default=8, help="of the figure")
    parser.add_argument("--layout", action="store_true")
    arguments = parser.parse_args()
    device, threads = jax.devices()[0].device_kind, torch.get_num_threads()
    print(f"{device} ({platform.machine()}), {os.cpu_count()} cores, {threads} torch threads")
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"a call to warm up, then the median of {arguments.rounds} rounds; load average now {os.getloadavg()[0]:.1f}")
    if arguments.context is not None:
        by_context(arguments.context or [64, 128, 256, 512, 1024], arguments.rounds)
    elif arguments.figure:
        by_fill(arguments.figure, arguments.tokens, arguments.window, arguments.batch, arguments.rounds)
    elif arguments.layout:
        by_layout(arguments.rounds)
    else:
        table(arguments.batches, arguments.naive_rows, arguments.rounds)


if __name__ == "__main__":
    main()
