"""One of several processes in a test: meets the others, and then does what its last argument says.

python tests/process_child.py HOST:PORT PROCESSES PROCESS_ID PATIENCE WHAT
"""

import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxlm.config import MeshConfig
from jaxlm.errors import CheckError, UserError
from jaxlm.sharding import processes


def meet_and_agree(i):
    print(jax.process_count(), processes.count(), processes.first(), processes.agree(10 + i, 7 * i).tolist())
    processes.check_same({"sha256": "abc", "rows": {"train": 3}})
    processes.wait("writing")
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
        if step % 100 == 10:
            print("step", step, flush=True)
        time.sleep(0.001)


def wait_for_ever(i):
    processes.advise(lambda: "start all again with --resume")
    print("step 0", flush=True)
    time.sleep(600)


def main(coordinator, count, process_id, patience, what):
    i = int(process_id)
    mesh = MeshConfig(coordinator=coordinator, processes=int(count), process_id=i)
    try:
        with processes.joined(mesh, float(patience)):
            globals()[what](i)
    except (UserError, CheckError) as error:
        print(f"jaxlm: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
