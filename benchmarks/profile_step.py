"""Where the time of a training step goes, by the profiler of JAX: the parts of the model, and the slowest operations.

  python benchmarks/profile_step.py --preset chargpt --trace /tmp/trace

The compiled loop of `jaxlm train` takes some steps, without dropout, under `jax.profiler`. Each operation of the trace
is looked up in the compiled program, whose metadata says which module it comes from. On a CPU operations run on several
threads at once, and a thread may wait, so times need not add up to the step; shares are of their sum. The folder of
--trace holds the trace for a viewer such as Perfetto.
"""

import argparse
import collections
import glob
import gzip
import json
import os
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, environment_lines
from train_step import STEPS, setting, text

from jaxlm.data.batches import TokenStream
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.loop import make_chunk
from jaxlm.training.step import init_state

PARTS = {
    "projections of attention": r"/attention/(query|key|value|out)/",
    "attention": "/attention/",
    "MLP": "/mlp/",
    "norms": "norm/",
    "head and loss": "/head/|loss|target",
}
"""The parts, and what the name of an operation holds; the first that fits counts."""


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to, and whether it is of the backward pass."""
    direction = "backward" if "transpose(" in op_name else "forward"
    found = next((part for part, pattern in PARTS.items() if re.search(pattern, op_name)), None)
    return f"{found}, {direction}" if found else "embeddings, optimizer, other"


def origins(program: str) -> dict[str, str]:
    """The `op_name` of each instruction of a compiled program; of a fusion that has none, the last one inside it."""
    found: dict[str, str] = {}
    inside: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if match := re.match(r"\s*%?([\w.-]+) \(.*\{$", line):
            computation = match[1]
        if match := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line):
            name = re.search(r'op_name="([^"]*)"', line)
            called = re.search(r"calls=%?([\w.-]+)", line)
            if name:
                inside[computation] = name[1]
            origin = name[1] if name else inside.get(called[1], "") if called else ""
            found[match[1]] = origin
    return found


def profiled(name: str, steps: int, folder: str) -> tuple[dict[str, float], dict[str, str], float]:
    """Milliseconds of each operation in a step, the program's names, and milliseconds of a whole step."""
    config = setting(name, smoke=False)
    cfg = config.model
    model, tx = build_model(cfg), build_optimizer(config.optim, 1_000_000)
    source = TokenStream(jnp.asarray(text(cfg.vocab_size)), cfg.max_seq_len)
    state = init_state(init_params(model, jax.random.key(0)), tx)
    program = make_chunk(model, tx, config.train).lower(state, source, np.int32(1)).compile()
    state, _ = jax.block_until_ready(program(state, source, np.int32(1)))
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        begun = time.perf_counter()
        jax.block_until_ready(program(state, source, np.int32(1 + steps)))
        seconds = time.perf_counter() - begun
    path = max(glob.glob(f"{folder}/**/*perfetto_trace.json.gz", recursive=True), key=os.path.getmtime)
    names = origins(program.as_text())
    times: dict[str, float] = collections.defaultdict(float)
    with gzip.open(path) as stream:
        events = json.load(stream)["traceEvents"]
    for event in events:
        if event.get("ph") == "X" and event["name"] in names and not event["name"].startswith(("while", "call")):
            times[event["name"]] += event["dur"] / 1e3 / steps
    return times, names, 1e3 * seconds / steps


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=STEPS, default="chargpt")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=10, help="slowest operations to name")
    parser.add_argument("--trace", metavar="FOLDER", help="keep the trace there")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: give at least 1")
    with tempfile.TemporaryDirectory() as folder:
        times, names, step = profiled(arguments.preset, arguments.steps, arguments.trace or folder)
    parts: dict[str, float] = collections.defaultdict(float)
    for operation, ms in times.items():
        parts[part_of(names[operation])] += ms
    total = sum(times.values())
    print(environment_lines(environment("jax", "jaxlib")))
    print(f"{arguments.preset}: {step:.1f} ms a step under the profiler; operations of all threads {total:.1f} ms\n")
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{ms:9.2f} ms {ms / total:6.1%}  {part}")
    print()
    for operation, ms in sorted(times.items(), key=lambda item: -item[1])[: arguments.top]:
        print(f"{ms:9.2f} ms {ms / total:6.1%}  {operation}: {names[operation] or 'no name'}")


if __name__ == "__main__":
    main()
