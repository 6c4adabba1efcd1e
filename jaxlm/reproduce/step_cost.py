"""What a training step costs, measured in a process of its own: time, compiled memory, peak resident memory."""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.config import ExperimentConfig, ModelConfig
from jaxlm.config.base import from_dict, to_dict
from jaxlm.errors import CheckError
from jaxlm.model.attention import Attention
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.reproduce.attention_cost import compiled_bytes
from jaxlm.training.step import init_state, train_step
from jaxlm.types import Params, tree_bytes

ROUNDS = 7


def measured_step(config: ExperimentConfig, rounds: int = ROUNDS) -> dict[str, float]:
    """Trains some steps on random tokens in a new process.

    Returns:
      step_ms: median after two steps of warm-up.
      compiled_bytes: what XLA's program needs for a step: arguments, results and temporaries.
      resident_bytes: the most memory that the process held at any moment, Python and compiler included.
      before_attention_bytes: the activations that enter the attention of one layer.
      after_attention_bytes: those, its output, and what its backward pass keeps.

    Raises:
      CheckError: the process failed.
    """
    command = [sys.executable, "-m", "jaxlm.reproduce.step_cost", json.dumps(to_dict(config)), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it printed nothing"]
        raise CheckError(f"the measurement of a step ended with exit code {done.returncode}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def cost_of_step(config: ExperimentConfig, rounds: int) -> dict[str, float]:
    """`measured_step`, in this process."""
    cfg = config.model
    model = build_model(cfg)
    params = init_params(model, jax.random.key(0))
    tx = build_optimizer(config.optim, config.train.steps, params)
    state = init_state(params, tx)
    windows = jax.random.randint(jax.random.key(1), (config.train.batch_size, cfg.max_seq_len + 1), 0, cfg.vocab_size)
    step = jax.jit(lambda state, windows: train_step(state, windows, model, tx, 0), donate_argnums=0)
    compiled = step.lower(state, windows).compile()
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        state, metrics = compiled(state, windows)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
    per_sequence = [_attention_bytes(cfg, batch) for batch in (1, 2)]
    before, after = (config.train.batch_size * (two - one) for one, two in zip(*per_sequence, strict=True))
    return {
        "step_ms": 1e3 * statistics.median(times[2:]),
        "compiled_bytes": compiled_bytes(compiled),
        "resident_bytes": _peak_resident_bytes(),
        "before_attention_bytes": before,
        "after_attention_bytes": after,
    }


def _attention_bytes(cfg: ModelConfig, batch: int) -> tuple[int, int]:
    """What enters the first layer's attention, and that with its output and all that its backward pass needs."""
    layer = Attention(cfg, cfg.layer_settings[0])
    x = jax.ShapeDtypeStruct((batch, cfg.max_seq_len, cfg.embed_dim), cfg.dtype)
    positions = jnp.arange(cfg.max_seq_len)[None]

    def forward(params: Params, x: Array) -> Any:
        return jax.vjp(lambda params, x: layer.apply(params, x, positions, None, train=False)[0], params, x)

    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros(x.shape), positions, None, train=False))
    return tree_bytes(x), tree_bytes(x) + tree_bytes(jax.eval_shape(forward, params, x))


def _peak_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(arguments: list[str]) -> None:
    """Prints the cost of a config as one JSON object."""
    config, rounds = from_dict(ExperimentConfig, json.loads(arguments[0])), int(arguments[1])
    print(json.dumps(cost_of_step(config, rounds)))


if __name__ == "__main__":
    main(sys.argv[1:])
