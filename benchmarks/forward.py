"""Time of a forward pass, logits of every token: jaxlm against Hugging Face's GPT-2 and PyTorch's own layers.

Every contestant runs in a process of its own, in float32 and without gradients; after a warm-up they take turns, and a
ratio compares the times of one round. Then the memory of jaxlm's program over longer and longer sequences, as XLA
plans it.

  python benchmarks/forward.py --json forward.json
"""

import argparse
import math
import time
from collections.abc import Callable

from common import (
    Reply,
    environment,
    environment_lines,
    idle_line,
    serve,
    speed_ratios,
    spread,
    started,
    take_turns,
    write_json,
)

from jaxlm.config import ModelConfig

SIZES = {"12x64": (4, 128), "32x256": (4, 128), "64x128": (6, 192), "1x1024": (4, 256)}
"""Rows x tokens: layers and width. Heads are 32 wide, the vocabulary has 65 characters."""

NAMES = {
    "jaxlm": "jaxlm",
    "hf": "Hugging Face, eager",
    "hf-compiled": "Hugging Face, compiled",
    "torch": "torch.nn, eager",
    "torch-compiled": "torch.nn, compiled",
}
LENGTHS = (1024, 2048, 4096, 8192)
"""Of the table of memory: one row, 4 layers of width 256."""


def config(layers: int, width: int, length: int) -> ModelConfig:
    """GPT-2 of this size."""
    return ModelConfig(
        vocab_size=65, max_seq_len=length, num_layers=layers, embed_dim=width, num_heads=width // 32, head_dim=32
    )


def jaxlm_contestant(rows: int, cfg: ModelConfig) -> Callable[[], object]:
    """A compiled forward pass."""
    import jax
    import jax.numpy as jnp

    import jaxlm

    model = jaxlm.build_model(cfg)
    params = jaxlm.init_params(model, jax.random.key(0))
    tokens = jnp.zeros((rows, cfg.max_seq_len), jnp.int32)
    program = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    return lambda: jax.block_until_ready(program(params, tokens))


def torch_contestant(name: str, rows: int, cfg: ModelConfig) -> Callable[[], object]:
    """The same of a PyTorch model."""
    import torch
    import torch_models

    kind, _, compiled = name.partition("-")
    model, _ = {"torch": torch_models.fused, "hf": torch_models.hugging_face}[kind](cfg)
    model = model.eval()
    forward = torch.compile(model) if compiled else model
    tokens = torch.zeros(rows, cfg.max_seq_len, dtype=torch.long)

    @torch.no_grad()
    def call() -> object:
        return forward(tokens)

    return call


def prepare(contestant: str, rows: int, length: int, layers: int, width: int) -> Callable[..., Reply]:
    """What a worker does: it times calls."""
    cfg = config(layers, width, length)
    call = jaxlm_contestant(rows, cfg) if contestant == "jaxlm" else torch_contestant(contestant, rows, cfg)
    call()

    def answer(calls: int) -> Reply:
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        return {"seconds": (time.perf_counter() - begun) / calls}

    return answer


def race(size: str, contestants: list[str], rounds: int, smoke: bool) -> Reply:
    """All contestants at one size: warm-up, then rounds in turn of about half a second each."""
    rows, length = map(int, size.split("x"))
    layers, width = SIZES[size]
    if smoke:
        rows, length, layers, width = 2, 16, 1, 32
    shape = {"rows": rows, "length": length, "layers": layers, "width": width}
    specs = {name: {"contestant": name, **shape} for name in contestants}
    with started(__file__, specs, {name: [{"calls": 3}] for name in contestants}, size) as (workers, first, failed):
        requests = {name: [{"calls": max(1, int(0.5 / answer[-1]["seconds"]))}] for name, answer in first.items()}
        replies, failed_later = take_turns(workers, requests, rounds)
        idle = idle_line(workers)
    failed |= failed_later
    if "jaxlm" in failed:
        raise SystemExit(f"error: jaxlm did not run: {failed['jaxlm']}")
    seconds = {name: [reply["seconds"] for [reply] in answers] for name, answers in replies.items()}
    found = {name: {"not_available": reason} for name, reason in failed.items()}
    for name, times in seconds.items():
        found[name] = {"seconds": times, "jaxlm_times_as_fast": speed_ratios(seconds["jaxlm"], times)}
    return {**shape, "idle": idle, "contestants": {name: found[name] for name in contestants}}


def memory(lengths: tuple[int, ...]) -> dict[int, int]:
    """Bytes of jaxlm's program beside parameters and tokens: logits and temporaries."""
    import jax
    import jax.numpy as jnp

    import jaxlm

    found = {}
    for length in lengths:
        model = jaxlm.build_model(config(4, 256, length))
        params = jax.eval_shape(lambda model=model: jaxlm.init_params(model, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        program = jax.jit(lambda params, tokens, model=model: model.apply({"params": params}, tokens)[0])
        sizes = program.lower(params, tokens).compile().memory_analysis()
        found[length] = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="rows x tokens; all")
    parser.add_argument("--contestants", nargs="+", choices=list(NAMES)[1:], default=list(NAMES)[1:])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each, in turn")
    parser.add_argument("--json", metavar="FILE", help="also write every number there")
    parser.add_argument("--smoke", action="store_true", help="very small sizes, one round: does the script run?")
    parser.add_argument("--worker", metavar="SPEC", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(prepare, arguments.worker)
        return
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: give at least 1")
    smoke = arguments.smoke
    rounds, sizes = (1, arguments.size[:1]) if smoke else (arguments.rounds, arguments.size)
    report: Reply = {"environment": environment("jax", "jaxlib", "torch", "transformers"), "rounds": rounds}
    print(f"{environment_lines(report['environment'])}\nmedians (least to most) of {rounds} rounds in turn", flush=True)
    report["sizes"] = {}
    for size in sizes:
        found = race(size, ["jaxlm", *arguments.contestants], rounds, smoke)
        report["sizes"][size] = found
        print(f"\n{size} tokens, {found['layers']} layers of {found['width']}; {found['idle']}")
        print(f"{'':24}{'ms':30}jaxlm times as fast")
        for name, row in found["contestants"].items():
            if "not_available" in row:
                print(f"{NAMES[name]:24}not available: {row['not_available']}")
                continue
            ratios = "" if name == "jaxlm" else spread(row["jaxlm_times_as_fast"], 2)
            print(f"{NAMES[name]:24}{spread(row['seconds'], 2, 1e3):30}{ratios}", flush=True)
        write_json(arguments.json, report)
    bytes_at = memory((32, 64) if smoke else LENGTHS)
    (first, small), *_, (last, large) = bytes_at.items()
    report["memory"] = {"bytes": bytes_at, "power": math.log(large / small) / math.log(last / first)}
    columns = ", ".join(f"{length:,}: {size / 1e6:.1f}" for length, size in bytes_at.items())
    print(f"\nmemory of one row, 4 layers of 256, MB by tokens: {columns}; grows as T^{report['memory']['power']:.2f}")
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
