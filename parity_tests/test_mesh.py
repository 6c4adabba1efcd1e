"""`jaxlm parity` on a mesh of eight virtual devices, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

CHECK = "import checking; checking.install(); import test_mesh; test_mesh.print_reports()"


def print_reports():
    """Reports of a model split over a mesh: as it is, and with one sum over devices missing."""
    import jax
    from jax.sharding import PartitionSpec

    import jaxlm
    from jaxlm.model import layers
    from jaxlm.ops.partition import mesh_shape
    from jaxlm.parity import check, random_params

    cfg = jaxlm.ModelConfig(
        vocab_size=13, max_seq_len=16, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, window=5
    )
    params, whole = random_params(cfg, 0), layers.matmul
    rows = PartitionSpec(("data", "fsdp"))

    def own_features_only(x, kernel, dtype=None):
        if kernel.shape != (24, 16) or len(x) == 1 or not mesh_shape():  # of the projection down
            return whole(x, kernel, dtype)
        split = PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec("tensor")
        own = jax.shard_map(lambda x, y: whole(x, y, dtype), in_specs=split, out_specs=rows, check_vma=False)
        return own(x, kernel)

    with jaxlm.use_mesh(jaxlm.make_mesh(jaxlm.MeshConfig(data=2, fsdp=2, tensor=2))):
        sound = check(cfg, params, draws=1)
        with mock.patch.object(layers, "matmul", own_features_only):
            wrong = check(cfg, params, draws=1, parts=())
    first = None if wrong.first is None else wrong.first.layer
    print(json.dumps({"sound": sound.passed, "rows": len(sound.rows), "wrong": wrong.passed, "first": first}))


@pytest.mark.slow
def test_a_model_on_a_mesh_is_torchrefs_and_a_missing_sum_is_located():
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["sound"]
    assert report["rows"] > 30
    assert (report["wrong"], report["first"]) == (False, "block_0/mlp/down")
