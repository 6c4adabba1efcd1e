"""Attention inside documents on a mesh of eight virtual devices: the loss and the gradients of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import checking
checking.install()
import jax
import jax.numpy as jnp
from on_mesh import config, mesh_of
from jaxlm.model.build import build_model, init_params
from jaxlm.sharding.mesh import use_mesh
from jaxlm.training.step import batch_loss

cfg = config("transformer")
windows = jax.random.randint(jax.random.key(1), (8, 25), 0, 6)
results = {}
for name, shape, end in (("one", None, 3), ("mesh", (2, 2, 2), 3), ("stream", None, None)):
    with use_mesh(None if shape is None else mesh_of(shape)):
        model = build_model(cfg)
        params = init_params(model, jax.random.key(0))
        loss = lambda params: batch_loss(params, model, windows, jax.random.key(2), document_end=end)
        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
        leaves = jax.tree.leaves(jax.device_get(gradients))
        weighted = sum(float((leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)).sum()) for leaf in leaves)
        results[name] = [float(value), weighted]
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_mesh_keeps_attention_inside_documents():
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(abs(a - b) < 1e-10 for a, b in zip(found["one"], found["mesh"], strict=True)), found
    assert all(abs(a - b) > 1e-4 for a, b in zip(found["one"], found["stream"], strict=True)), found
