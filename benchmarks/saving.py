"""How much of a run's time saving takes, in the foreground and in the background.

    python benchmarks/saving.py [--preset nanogpt-cpu] [--steps 120] [--every 20] [--rounds 3]

Trains in turn with each, from the same compiled programs, and prints for each the seconds of the session after its
first step, the share in which training waited for saves, and that the ends are bitwise the same. The first save of a
session is always waited for.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before jax is imported

import jax
import numpy as np
from common import environment, environment_lines

from jaxlm.config import DataConfig
from jaxlm.config.presets import preset
from jaxlm.run import saving
from jaxlm.run.folder import load_run
from jaxlm.run.hooks import ShowProgress
from jaxlm.run.training import train


def measure(config: Any, out: Path, background: bool) -> dict[str, float]:
    """Trains, and returns the seconds after step 1 and those in which training waited for saves."""
    waited, began = 0.0, 0.0
    save, wait, on_chunk = saving.Saver.save, saving.Saver.wait, ShowProgress.on_chunk
    depth = 0

    def timed(method: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal waited, depth
            started, depth = time.perf_counter(), depth + 1
            result = method(*args)
            depth -= 1
            waited += 0.0 if depth else time.perf_counter() - started  # a save waits for the one before
            return result

        return call

    def noting(self: Any, metrics: Any, steps: int, seconds: float) -> None:
        nonlocal began
        began = began or time.perf_counter()
        on_chunk(self, metrics, steps, seconds)

    patches = [
        mock.patch.object(saving, "WORTH", 0.0 if background else float("inf")),
        mock.patch.object(saving.Saver, "save", timed(save)),
        mock.patch.object(saving.Saver, "wait", timed(wait)),
        mock.patch.object(ShowProgress, "on_chunk", noting),
    ]
    for patch in patches:
        patch.start()
    train(config, out)
    for patch in patches:
        patch.stop()
    return {"seconds": time.perf_counter() - began, "waited": waited}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="nanogpt-cpu")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", help="a text; default: the preset's own data")
    given = parser.parse_args()
    base = preset(given.preset)
    rhythm = dataclasses.replace(
        base.train, steps=given.steps, checkpoint_every=given.every, eval_every=given.steps, log_every=given.every
    )
    data = base.data if given.data is None else DataConfig(path=given.data)
    config = dataclasses.replace(base, train=rhythm, data=data, optim=dataclasses.replace(base.optim, warmup_steps=1))
    print(environment_lines(environment("jaxlm", "jax", "orbax-checkpoint")))
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as work:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_compilation_cache_dir", f"{work}/programs")
        measure(config, Path(work) / "warm-up", background=False)
        for turn in range(given.rounds):
            for background in (False, True):
                found[background].append(measure(config, Path(work) / f"{turn}-{background}", background))
            ends = [load_run(Path(work) / f"{turn}-{kind}", given.steps).params for kind in (False, True)]
            jax.tree.map(np.testing.assert_array_equal, *ends)
    print(f"\n{given.preset}, {given.steps} steps, a checkpoint every {given.every}, median of {given.rounds}\n")
    print("| saves | seconds | training waits for them | share |\n| --- | --- | --- | --- |")
    for background, entries in found.items():
        seconds, waited = (statistics.median(entry[name] for entry in entries) for name in ("seconds", "waited"))
        where = "in the background" if background else "in the foreground"
        print(f"| {where} | {seconds:.2f} | {waited:.2f} s | {waited / seconds:.1%} |")


if __name__ == "__main__":
    main()
