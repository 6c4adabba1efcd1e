"""Training on meshes of eight virtual devices, in a process of its own: `run(["compare", ...])` from a test.

As a program: `python tests/on_mesh.py CHECK ARGUMENTS`, with JAX_NUM_CPU_DEVICES=8. It prints one JSON object.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import checking

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8))
"""Devices along (data, fsdp, tensor)."""

OPTIMIZERS = ("sgd", "adamw", "adamsn", "adafactor", "lion")
"""The last is one of Optax's."""

MODELS = {
    "transformer": {
        "vocab_size": 65,  # which no mesh divides
        "max_seq_len": 24,
        "num_layers": 4,
        "embed_dim": 32,
        "num_heads": 16,
        "num_kv_heads": 8,
        "mlp_dim": 48,
        "window": (5, None),
        "position": "rope",
        "activation": "swiglu",
        "use_bias": True,
        "scan_layers": True,
        "remat": True,
        "dropout": 0.2,
        "attention_dropout": 0.1,
    },
    "recurrent": {
        "family": "recurrent",
        "cell": "gru",
        "vocab_size": 64,
        "max_seq_len": 24,
        "num_layers": 2,
        "embed_dim": 32,
        "init": "torch",
        "dropout": 0.1,
    },
    "bigram": {"family": "bigram", "vocab_size": 64, "max_seq_len": 24},
}

PLAIN = {"vocab_size": 65, "max_seq_len": 24, "num_layers": 1, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2}

ROWS, GRAD_ACCUM = 16, 2


def run(check: str, *arguments: str, devices: int = 8, x64: bool = False) -> dict:
    """What one of this page's checks prints, in a process with so many virtual devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_ENABLE_X64": str(int(x64))}
    command = [sys.executable, __file__, check, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def mesh_of(shape):
    """A mesh of (data, fsdp, tensor), as `jaxlm train` makes it."""
    from jaxlm.config import MeshConfig
    from jaxlm.sharding.mesh import make_mesh

    data, fsdp, tensor = shape
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def config(name):
    """One of MODELS, in float64 where JAX computes in 64 bits."""
    import jax

    from jaxlm.config import ModelConfig

    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    return ModelConfig(**MODELS[name], dtype=dtype, param_dtype=dtype)


def optimizer_of(name, params):
    """One of OPTIMIZERS, at a rate at which it learns."""
    from jaxlm.config import OptimConfig
    from jaxlm.optim import build_optimizer

    rate = {"sgd": 0.5, "adamsn": 1e-2}.get(name, 1e-3)
    return build_optimizer(OptimConfig(name=name, learning_rate=rate, warmup_steps=2), 20, params)


def trained(name, optimizer, mesh, steps=20, begin=lambda state: state):
    """The losses of some steps, and the last state; `begin` may replace the first."""
    import jax
    import numpy as np

    from jaxlm.config import TrainConfig
    from jaxlm.data.batches import TokenStream
    from jaxlm.model.build import build_model, init_params
    from jaxlm.sharding.layout import put
    from jaxlm.sharding.mesh import use_mesh
    from jaxlm.training.loop import make_chunk
    from jaxlm.training.step import init_state

    cfg = config(name)
    train = TrainConfig(batch_size=ROWS, grad_accum=GRAD_ACCUM, steps=20)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 2000).astype(np.uint8)
    tokens[1::2] = tokens[::2]  # something to learn
    with use_mesh(mesh):
        model = build_model(cfg)
        params = init_params(model, jax.random.key(0))
        tx = optimizer_of(optimizer, params)
        state = init_state(params, tx)
        state = begin(state)
        chunk = make_chunk(model, tx, train, state)
        source = TokenStream(tokens, cfg.max_seq_len).feed(0, ROWS, 20, put)
        losses = []
        for step in range(int(state.step), steps):
            state, metrics = chunk(state, source(step), np.int32(step + 1))
            losses.append(float(metrics.loss))
        assert chunk._cache_size() == 1, "a second step compiles nothing"
    return losses, state


def compare(models, optimizers, meshes, steps="20"):
    """The largest difference of the losses on each mesh from those of one device."""
    differences = {}
    for name in models.split(","):
        for optimizer in optimizers.split(","):
            alone, _ = trained(name, optimizer, None, int(steps))
            assert alone[-1] < alone[0] - 1e-3, (name, optimizer, alone)
            for shape in json.loads(meshes):
                losses, _ = trained(name, optimizer, mesh_of(shape), int(steps))
                worst = max(abs(a - b) for a, b in zip(alone, losses, strict=True))
                differences[f"{name} {optimizer} {tuple(shape)}"] = worst
                print(f"{name} {optimizer} {shape} {worst:.2e}", file=sys.stderr, flush=True)
    return differences


def checkpoints(folder, meshes):
    """A checkpoint of the mesh (2, 2, 2): is it bitwise the same on others, and does training go on with its losses?"""
    import jax
    import numpy as np

    from jaxlm.run import checkpoint
    from jaxlm.sharding.mesh import use_mesh

    losses, state = trained("transformer", "adafactor", mesh_of((2, 2, 2)), 2)
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    with use_mesh(mesh_of((2, 2, 2))):
        checkpoint.save(Path(folder), state, None, 1)
    whole, _ = trained("transformer", "adafactor", None, 4)
    found = {}
    for shape in json.loads(meshes):
        mesh = mesh_of(shape)
        read = []

        def restore(like, read=read):
            state = checkpoint.restore_latest(Path(folder), like)[0]
            read += [(np.asarray(leaf), len(leaf.sharding.device_set)) for leaf in jax.tree.leaves(state)]
            return state

        losses, _ = trained("transformer", "adafactor", mesh, 4, restore)
        found[str(tuple(shape))] = {
            "bitwise": all((a == b).all() for (a, _), b in zip(read, expected, strict=True)),
            "devices": read[0][1],
            "losses": max(abs(a - b) for a, b in zip(losses, whole[2:], strict=True)),
        }
    return found


def device_bytes(tree):
    """The most bytes of a tree that one device holds."""
    import jax

    held: dict = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def sizes(models, optimizers, meshes):
    """Bytes a device of parameters and of the optimizer's state, on one device and on meshes."""
    import jax

    from jaxlm.model.build import build_model, init_params
    from jaxlm.sharding.mesh import use_mesh
    from jaxlm.training.step import init_state

    found = {}
    for name in models.split(","):
        for optimizer in optimizers.split(","):
            for shape in json.loads(meshes):
                mesh = mesh_of(shape)
                with use_mesh(mesh):
                    params = init_params(build_model(config(name)), jax.random.key(0))
                    state = init_state(params, optimizer_of(optimizer, params))
                own = {"params": bytes_by_path(state.params), "opt_state": device_bytes(state.opt_state)}
                found[f"{name} {optimizer} {tuple(shape)}"] = own
    return found


def quick(folder):
    """A little of everything, in one process: losses, bytes and a checkpoint of the mesh (2, 2, 2), and decoding."""
    import jax
    import numpy as np

    import jaxlm
    from jaxlm.run import checkpoint
    from jaxlm.sharding.mesh import use_mesh
    from jaxlm.training.step import TrainState, init_state

    alone, _ = trained("transformer", "adamsn", None, 4)
    losses, state = trained("transformer", "adamsn", mesh_of((2, 2, 2)), 4)
    with use_mesh(mesh_of((2, 2, 2))):
        checkpoint.save(Path(folder), state, None, 1)
    places = {}
    for shape in ((1, 1, 1), (8, 1, 1)):
        with use_mesh(mesh_of(shape)):
            params = jaxlm.init_params(jaxlm.build_model(config("transformer")), jax.random.key(1))
            like = init_state(params, optimizer_of("adamsn", params))
            restored: TrainState = checkpoint.restore_latest(Path(folder), like)[0]
        pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
        same = all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)
        places[str(shape)] = same, len(restored.step.sharding.device_set)
    model = jaxlm.build_model(jaxlm.ModelConfig(**PLAIN))
    params = jax.tree.map(lambda leaf: leaf * 8, jaxlm.init_params(model, jax.random.key(0)))
    prompts = np.random.default_rng(1).integers(0, 65, (8, 3)).astype(np.int32)
    options = {"max_new_tokens": 8, "key": jax.random.key(2), "temperature": 0.0}
    expected = jaxlm.generate(model, params, prompts, **options)
    with use_mesh(mesh_of((2, 2, 2))):
        there = jaxlm.generate(model, jaxlm.put_params(model, params), prompts, **options)
        cache = jax.jit(lambda: model.init_cache(8, 16))()
    with use_mesh(mesh_of((2, 2, 2))):
        names = ("recurrent", "bigram")
        others = {
            name: bytes_by_path(jaxlm.init_params(jaxlm.build_model(config(name)), jax.random.key(1))) for name in names
        }
    return {
        "losses": max(abs(a - b) for a, b in zip(alone, losses, strict=True)),
        "params": {"transformer": bytes_by_path(state.params), **others},
        "opt_state": [device_bytes(state.opt_state), sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))],
        "checkpoint": places,
        "tokens": (np.asarray(there.tokens) == np.asarray(expected.tokens)).all().item(),
        "distinct": len(np.unique(np.asarray(expected.tokens))),
        "cache": [device_bytes(cache.layers[0].stored_keys), cache.layers[0].stored_keys.nbytes],
    }


def bytes_by_path(tree):
    """Of each array: the most bytes that one device holds, and all of its bytes."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [device_bytes(leaf), leaf.nbytes]
        for path, leaf in leaves
    }


def memory(meshes):
    """Bytes of temporary arrays a device in the gradient of 8 rows of 2,048 tokens, as compiled."""
    import jax
    import numpy as np

    import jaxlm
    from jaxlm.sharding.layout import abstract_params
    from jaxlm.sharding.mesh import use_mesh
    from jaxlm.training.step import batch_loss

    fields = PLAIN | {"max_seq_len": 2048, "num_heads": 8, "num_kv_heads": 8, "position": "rope"}
    kinds = {"all keys": {}, "window": {"window": 128}, "dropout": {"attention_dropout": 0.1}}
    windows = jax.ShapeDtypeStruct((8, 2049), np.int32)
    found = {}
    for kind, fields in kinds.items():
        cfg = jaxlm.ModelConfig(
            **PLAIN | {"max_seq_len": 2048, "num_heads": 8, "num_kv_heads": 8, "position": "rope"} | fields
        )
        model, key = jaxlm.build_model(cfg), jax.random.key(0) if "attention_dropout" in fields else None
        gradient = jax.grad(lambda params, windows, model=model, key=key: batch_loss(params, model, windows, key))
        for shape in json.loads(meshes):
            with use_mesh(mesh_of(shape)):
                compiled = jax.jit(gradient).lower(abstract_params(model), windows).compile()
            found[f"{kind} {tuple(shape)}"] = compiled.memory_analysis().temp_size_in_bytes
    return found


def planted():
    """How far the losses move if one sum over devices is missing, and the bytes if one rule is."""
    from unittest import mock

    import jax
    from jax.sharding import PartitionSpec

    from jaxlm.model import layers
    from jaxlm.ops import partition
    from jaxlm.training import step

    alone, _ = trained("transformer", "adamw", None, 3)

    def moved(shape):
        losses, _ = trained("transformer", "adamw", mesh_of(shape), 3)
        return max(abs(a - b) for a, b in zip(alone, losses, strict=True))

    def without_sum(function, inputs, output):
        return jax.shard_map(function, in_specs=inputs, out_specs=output, check_vma=False)

    rows = PartitionSpec(("data", "fsdp"))

    def own_rows_only(logits, targets):
        return without_sum(whole_loss, (rows, rows), PartitionSpec())(logits, targets)

    def own_features_only(x, kernel, dtype=None):
        if kernel.shape != (48, 32) or len(x) == 1 or not partition.mesh_shape():  # of the projection down
            return whole_product(x, kernel, dtype)
        split = (PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec("tensor"))
        return without_sum(lambda x, kernel: whole_product(x, kernel, dtype), split, rows)(x, kernel)

    whole_loss, whole_product = step.cross_entropy, layers.matmul
    result = {"nothing missing": moved((2, 1, 4))}
    with mock.patch.object(step, "cross_entropy", own_rows_only):
        result["sum over rows"] = moved((2, 1, 4))
    with mock.patch.object(layers, "matmul", own_features_only):
        result["sum over features"] = moved((2, 1, 4))
    return result


def decode(meshes):
    """32 rows of cached decoding on meshes: are the tokens those of one device? And the cache's bytes a device."""
    import dataclasses

    import jax
    import numpy as np

    import jaxlm
    from jaxlm.decode.prefill import start
    from jaxlm.decode.request import Prompts

    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    fields = MODELS["transformer"] | {"window": (9, None), "max_seq_len": 64, "dtype": dtype, "param_dtype": dtype}
    found = {}
    for name, changes in {"scanned": {}, "learned": {"position": "learned", "window": None}}.items():
        cfg = jaxlm.ModelConfig(**fields | changes)
        model = jaxlm.build_model(cfg)
        params = jaxlm.init_params(model, jax.random.key(0))
        params = jax.tree.map(lambda leaf: leaf * 5, params)
        prompts = np.random.default_rng(1).integers(0, 65, (32, 7)).astype(np.int32)
        lengths = np.arange(32) % 7 + 1
        options = {"max_new_tokens": 40, "key": jax.random.key(2), "temperature": 0.9, "top_k": 20}
        alone = jaxlm.generate(model, params, prompts, **options, prompt_lengths=lengths)
        for shape in json.loads(meshes):
            with jaxlm.use_mesh(mesh_of(shape)):
                placed = jaxlm.put_params(model, params)
                there = jaxlm.generate(model, placed, prompts, **options, prompt_lengths=lengths)
                plain = dataclasses.replace(cfg, scan_layers=False)
                unstacked = jaxlm.put_params(jaxlm.build_model(plain), jaxlm.unstack_params(cfg, params))
                one = np.asarray(prompts[:1])
                many = start(jaxlm.build_model(plain), unstacked, Prompts(one, np.array([7]), 32), 48)
            found[f"{name} {tuple(shape)}"] = {
                "equal": bool((np.asarray(there.tokens) == np.asarray(alone.tokens)).all()),
                "log_probs": float(np.abs(np.asarray(there.log_probs) - np.asarray(alone.log_probs)).max()),
                "distinct": len(np.unique(np.asarray(alone.tokens))),
                "cache_bytes": device_bytes([(layer.stored_keys, layer.stored_values) for layer in many.cache.layers]),
            }
            print(name, shape, found[f"{name} {tuple(shape)}"], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        checking.install()
        checks = (quick, compare, sizes, memory, planted, checkpoints, decode)
        answer = {check.__name__: check for check in checks}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(answer))
