"""Everything that jaxlm claims of one NVIDIA GPU, in one command, one table and one JSON file.

  python benchmarks/gpu.py                     at most 8 minutes; writes gpu-benchmark/results.json
  python benchmarks/gpu.py --parts decode      only some parts
  python benchmarks/gpu.py --smoke             the same parts in tiny sizes on a CPU

`benchmarks/gpu.sh` runs it on a machine without a network. The parts, most valuable first, each with a time limit:

  train   tokens/s and MFU of a training step of shakespeare-char and gpt2-124m, against a compiled model of nanoGPT's
          kind with flash attention: same batch, same precision, fused AdamW
  checks  jaxlm parity in float32 (without TF32) and bfloat16; a stopped and resumed run bit for bit; the tests of cuDNN
  run     shakespeare-char trained to its end in bfloat16 (nanoGPT: 1.4697 in about 3 minutes on an A100)
  decode  sampling with 1, 32 and 128 rows of gpt2-124m's size, against Hugging Face eager and compiled with a static
          cache, and against a step captured as a CUDA graph
  window  attention over 32,768 tokens, with and without a window of 1,024 keys: time and memory

JAX and PyTorch run in processes of their own, which take turns; a number is the median of the rounds. The file is
written after each part, so a stop loses nothing; what fails is a row that says why. Exit code 1: a row failed.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_parts
from gpu_parts import Row, Session

PACKAGES = ["jaxlm", "jax", "jaxlib", "flax", "optax", "torch", "triton", "transformers", "numpy", "nvidia-cudnn-cu13"]
PATIENCE = 4
"""How many times longer a smoke test may take: its machine may be busy."""
ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Device, driver and versions."""
    gpus: list[str] = []
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"gpu": gpus, "cpu": cpu, "python": platform.python_version(), "versions": versions}


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [["part", "what", "value", "unit", "x", "note"]]
    for row in rows:
        value = "" if row.value is None else f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append([row.part, row.what, value, row.unit, ratio, row.note])
    widths = [max(len(line[i]) for line in cells) for i in range(5)]
    lines = ["  ".join([*(text.ljust(w) for text, w in zip(line, widths, strict=False)), line[5]]) for line in cells]
    return "\n".join(line.rstrip() for line in lines) + "\nx: speed of jaxlm over that of this row's contestant"


def write(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """Writes everything known so far, whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    aside.replace(path)


def run_parts(session: Session, names: list[str], budget: float, facts: dict[str, Any]) -> list[Row]:
    """Runs the parts in order while there is time. Rows are printed and written as they come."""
    rows: list[Row] = []
    started = time.monotonic()
    for name in names:
        part, limit = gpu_parts.PARTS[name]
        limit *= PATIENCE if session.smoke else 1
        left = budget - (time.monotonic() - started)
        begun = time.monotonic()
        if left < 0.25 * limit:
            new = [Row(name, "all", note=f"failed: {left:.0f} s of {budget:.0f} s were left")]
        else:
            try:
                new = part(session, min(limit, left))
            except Exception as error:
                new = [Row(name, "all", note=f"failed: {gpu_parts.reason(error)}")]
        rows += new
        facts["part_seconds"] = {**facts.get("part_seconds", {}), name: round(time.monotonic() - begun, 1)}
        write(session.out / "results.json", facts, rows)
        print(f"\n{name}: {time.monotonic() - begun:.0f} s\n{table(new)}", flush=True)
    return rows


def environment(smoke: bool) -> dict[str, str]:
    """The environment of all processes: jaxlm from here, memory as needed, nothing from a network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
    }
    if smoke:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        settings |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": flags.strip()}
        settings |= {"GPU_BENCHMARK_TORCH_BACKEND": "eager", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **settings}


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=list(gpu_parts.PARTS), default=list(gpu_parts.PARTS))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all parts")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each lane, in turn")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-benchmark")), help="folder")
    arguments = parser.parse_args()
    facts = machine()
    if not arguments.smoke and not facts["gpu"]:
        print("gpu.py: error: nvidia-smi names no GPU: run it where there is one, or give --smoke", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    rounds = 1 if arguments.smoke else arguments.rounds
    device = facts["gpu"][0] if facts["gpu"] and not arguments.smoke else "CPU, a smoke test: its numbers mean nothing"
    session = Session(arguments.out.absolute(), environment(arguments.smoke), arguments.smoke, rounds, device)
    print(f"{device}; {facts['cpu']}, Python {facts['python']}")
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    print(f"{rounds} rounds in turn after a warm-up, medians", flush=True)
    facts |= {"device": device, "smoke": arguments.smoke, "rounds": rounds}
    budget = arguments.budget * (PATIENCE if arguments.smoke else 1)
    rows = run_parts(session, arguments.parts, budget, facts)
    print(f"\n{device}\n{table(rows)}\nwritten: {session.out / 'results.json'}")
    return int(any(row.note.startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
