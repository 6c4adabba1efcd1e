"""One of several processes in a test: meets the others, and then does what its last argument says.

python tests/process_child.py HOST:PORT PROCESSES PROCESS_ID PATIENCE WHAT [ARGUMENT...]
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.config import DataConfig, MeshConfig, TrainConfig
from jaxlm.config.presets import preset
from jaxlm.data.batches import TokenStream
from jaxlm.data.shards import ShardedTokens
from jaxlm.errors import UserError
from jaxlm.run import training
from jaxlm.run.folder import read_config
from jaxlm.run.hooks import StopOnRequest
from jaxlm.run.session import resumed_session
from jaxlm.sharding import processes
from jaxlm.sharding.layout import put, put_array, to_host
from jaxlm.sharding.mesh import make_mesh, use_mesh
from jaxlm.training.loop import loop


def meet_and_agree(i):
    print(jax.process_count(), processes.count(), processes.first())
    print(processes.agree(10 + i, 7 * i).tolist())
    with tempfile.TemporaryDirectory() as own:
        shared = Path(own).parent / f"{os.getppid()}-{'-'.join(sys.argv[1:3])}"  # the same in both
        with processes.first_before_others("writing"):
            if not shared.exists():
                shared.write_text(f"written by {i}")
        print(shared.read_text())
        processes.wait("reading")
        shared.unlink(missing_ok=True)
    processes.check_same({"sha256": "abc", "rows": {"train": 3}})
    print("same")
    processes.check_same({"seed": 1, "model": {"num_layers": 2 + i}})


def fail_in_one(i):
    if i == 1:
        raise UserError("the disk is full: free some space")
    step_for_ever(i)


def raise_in_one(i):
    if i == 1:
        raise ZeroDivisionError("1/0")
    step_for_ever(i)


def end_well(i):
    time.sleep(0.5 * i)


def step_for_ever(i):
    processes.advise(lambda: "start all again with --resume")
    for step in range(100_000):
        multihost_utils.process_allgather(jnp.float32(step))
        if step == 10:
            print("step 0", flush=True)
        time.sleep(0.001)


def wait_for_ever(i):
    processes.advise(lambda: "start all again with --resume")
    print("step 0", flush=True)
    time.sleep(600)


class State(NamedTuple):
    step: jax.Array


class Metrics(NamedTuple):
    loss: jax.Array


def train_until_signal(i):
    """Steps that take process 1 longer than process 0, and a collective in each, as in training."""
    received, ends = [], []
    signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    cfg = TrainConfig(steps=10**6, log_every=10**6, eval_every=10**6, checkpoint_every=10**6)

    def chunk(state, source, stop):
        ends.append(int(stop))
        time.sleep((0.01 + 0.02 * i) * (int(stop) - int(state.step)))
        total = multihost_utils.process_allgather(jnp.float32(int(stop))).sum()
        assert total == 2 * int(stop)
        print("step 0", flush=True)
        return State(jnp.int32(stop)), Metrics(jnp.float32(0))

    state = loop(chunk, State(jnp.int32(0)), lambda step: None, cfg, [StopOnRequest(cfg, received)])
    print("ended at", int(state.step), *ends)


def restore(i, out, shape):
    """Prints a digest of all that a run restores on a mesh."""
    config = read_config(Path(out))
    data, fsdp, tensor = json.loads(shape)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    with use_mesh(mesh):
        state = resumed_session(config, Path(out)).state
        leaves = jax.tree.leaves(state)
        assert any(len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated for leaf in leaves)
        print(int(state.step), digest(state))


def train_on_own_disk(i, root):
    """The same --out in all, but each in a folder of its own."""
    os.chdir(Path(root) / str(i))
    data = DataConfig(path=str(Path(root) / "text.txt"))
    training.train(dataclasses.replace(preset("tiny"), data=data, mesh=MeshConfig(data=2)), "out")


def digest(tree):
    """sha256 of all arrays of a tree, whole."""
    content = [(jax.tree_util.keystr(path), to_host(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return hashlib.sha256(b"".join(name.encode() + array.tobytes() for name, array in content)).hexdigest()


class Recorded(ShardedTokens):
    """Remembers which stretches were read."""

    read: ClassVar[list[tuple[int, int]]] = []

    def __getitem__(self, places):
        self.read.append((places.start, places.stop))
        return super().__getitem__(places)


def read_windows(i, files, meshes):
    """Prints for each mesh the windows that this process reads of memory-mapped files, and a digest of the batches."""
    arrays = [np.memmap(file, np.uint8, mode="r") for file in json.loads(files)]
    for data, fsdp, tensor in json.loads(meshes):
        Recorded.read.clear()
        with use_mesh(make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))):
            source = TokenStream(Recorded(arrays), 16).feed(3, 8, 5, put)(10)
            windows = sorted(set(Recorded.read))
            cut = jax.jit(lambda source, step: source.windows(3, step, 8))
            batches = [to_host(cut(source, put_array(np.int32(step)))) for step in range(10, 15)]
        print(json.dumps([windows, digest(batches)]))


def main(coordinator, count, process_id, patience, what, *arguments):
    i = int(process_id)
    mesh = MeshConfig(coordinator=coordinator, processes=int(count), process_id=i)
    try:
        with processes.joined(mesh, float(patience)):
            globals()[what](i, *arguments)
    except UserError as error:  # from before all had met
        print(f"jaxlm: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
