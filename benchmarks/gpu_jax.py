"""The lanes of `gpu.py` that run in JAX: `python benchmarks/gpu_jax.py LANE...`, or `resume FOLDER`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_lanes
import jax
import jax.numpy as jnp
import numpy as np
from gpu_lanes import NEW, PROMPT, SIZES, Made

import jaxlm
from jaxlm.config import ModelConfig, OptimConfig, TrainConfig
from jaxlm.data.batches import TokenStream
from jaxlm.model.build import build_model, init_params
from jaxlm.model.transformer import attention_implementations
from jaxlm.ops.attention import attend, cudnn_attend
from jaxlm.ops.blocked_attention import blocked_attend
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.matmul import matmul_precision
from jaxlm.optim import build_optimizer
from jaxlm.run.folder import load_run
from jaxlm.run.metrics import read_rows
from jaxlm.training.loop import make_chunk
from jaxlm.training.step import init_state


def config(size: str, precision: str, dropout: float = 0.0) -> ModelConfig:
    """The model of a size; `precision` is bfloat16, or how float32 is multiplied."""
    s = SIZES[size]
    return ModelConfig(
        vocab_size=s.vocab,
        max_seq_len=s.context,
        num_layers=s.layers,
        embed_dim=s.width,
        num_heads=s.heads,
        use_bias=False,
        dropout=dropout,
        attention_dropout=dropout,
        dtype="bfloat16" if precision == "bfloat16" else "float32",
    )


def train(size: str, precision: str, dropout: float = 0.0) -> Made:
    """Some steps of the compiled loop: forward, backward, clipping, AdamW on float32 parameters."""
    s = SIZES[size]
    cfg, model = config(size, precision, dropout), build_model(config(size, precision, dropout))
    tx = build_optimizer(OptimConfig(), 1_000_000)
    state = init_state(init_params(model, jax.random.key(0)), tx)
    tokens = np.random.default_rng(0).integers(0, s.vocab, 1_000_000).astype(np.uint16)
    source = TokenStream(jnp.asarray(tokens), s.context)
    with matmul_precision("default" if precision == "bfloat16" else precision):
        chunk = make_chunk(model, tx, TrainConfig(batch_size=s.batch))
        program = chunk.lower(state, source, jax.device_put(np.int32(1))).compile()
    done = 0

    def run() -> None:
        nonlocal state, done
        done += s.steps
        state, metrics = program(state, source, jax.device_put(np.int32(done)))
        loss = float(jax.device_get(metrics).loss)
        if not np.isfinite(loss):
            raise ValueError(f"the loss of step {done} is {loss}")

    attention = ", ".join(dict.fromkeys(attention_implementations(model, s.context)))
    return run, {"note": f"attention {attention}", "memory": reserved(program), "dtype": cfg.dtype}


def decode(batch: int, size: str) -> Made:
    """`jaxlm.generate` from a prompt, weights and cache in bfloat16."""
    cfg = dataclasses.replace(config(size, "bfloat16"), param_dtype="bfloat16", max_seq_len=PROMPT + NEW)
    model = build_model(cfg)
    params = init_params(model, jax.random.key(0))
    prompt = np.zeros((batch, PROMPT), np.int32)

    def run() -> None:
        out = jaxlm.generate(model, params, prompt, max_new_tokens=NEW, key=jax.random.key(0))
        jax.block_until_ready(out.tokens)

    return run, {}


def window(implementation: str, length: int, span: int | None) -> Made:
    """Forward and backward pass of one attention: batch 1, 12 heads of 64."""
    shape = (1, length, 12, 64)
    queries, keys, values = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def attention(queries, keys, values):
        if implementation == "cudnn":
            out = cudnn_attend(queries, keys, values, span)
        elif implementation == "local":
            out = blocked_attend(queries, keys, values, positions, positions, span)
        else:
            out = attend(queries, keys, values, attention_mask(positions, positions, span))
        return out.astype(jnp.float32).sum()

    program = jax.jit(jax.grad(attention, (0, 1, 2))).lower(queries, keys, values).compile()
    return lambda: jax.block_until_ready(program(queries, keys, values)), {"memory": reserved(program)}


def peak(precision: str, n: int) -> Made:
    """Ten products of two n x n matrices."""
    kind = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jax.random.normal(jax.random.key(0), (n, n), kind) * n**-0.5  # the products stay as large
    with matmul_precision("default" if precision == "bfloat16" else precision):
        program = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, y: x @ y, x)).lower(x).compile()
    return lambda: jax.block_until_ready(program(x)), {"flops": 10 * 2 * n**3}


def reserved(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program reserves: arguments, results (donated ones once), temporaries."""
    sizes = program.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )


def make(lane: str) -> Made:
    """Builds a lane."""
    kind, *rest = lane.split(":")
    if kind == "train":
        return train(*rest[:2], dropout=0.2 if rest[2:] == ["dropout"] else 0.0)
    if kind == "decode":
        return decode(int(rest[0]), rest[1])
    if kind == "window":
        return window(rest[0], int(rest[1]), int(rest[2]) or None)
    return peak(rest[0], int(rest[1]))


def resume(folder: Path) -> str:
    """Trains once without a stop and once stopped and resumed, each in processes of its own, and compares the bits."""
    options = ["--model.dtype", "bfloat16", "--model.dropout", "0.1", "--optim.schedule", "constant"]
    options += ["--optim.warmup-steps", "5", "--train.eval-every", "20", "--train.checkpoint-every", "20"]
    # cuDNN's program cannot run under the flag below: jaxlib 0.11.2 stops with an IndexError.
    options += ["--model.attention-impl", "local"]
    deterministic = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    # Without compiled programs on disk: each process must choose the same kernels anew.
    environment = {**os.environ, "XLA_FLAGS": deterministic, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    calls = [("whole", 40, ["tiny", *options]), ("cut", 20, ["tiny", *options]), ("cut", 40, ["--resume"])]
    for name, steps, arguments in calls:
        few = ["--train.steps", str(steps), "--sample.max-new-tokens", "8", "--out", str(folder / name)]
        command = [sys.executable, "-m", "jaxlm", "train", *arguments, *few]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {gpu_lanes.last_line(done.stderr)}")
    whole, cut = (load_run(folder / name, 40) for name in ("whole", "cut"))
    pairs = zip(*(jax.tree.leaves(run.params) for run in (whole, cut)), strict=True)
    differing = sum(not np.array_equal(a, b) for a, b in pairs)
    losses = [
        [row.get("loss", row.get("val_loss")) for row in read_rows(run.path / "metrics.jsonl")] for run in (whole, cut)
    ]
    if differing or losses[0] != losses[1]:
        raise RuntimeError(f"{differing} parameters differ, losses {'agree' if losses[0] == losses[1] else 'differ'}")
    return f"{len(losses[0])} losses and all parameters have the same bits"


if __name__ == "__main__":
    if sys.argv[1] == "resume":
        print(resume(Path(sys.argv[2])))
    elif sys.argv[1] == "facts":
        device = jax.devices()[0]
        print(json.dumps({"kind": device.device_kind, "platform": device.client.platform_version}))
    else:
        gpu_lanes.serve(sys.argv[1:], make)
