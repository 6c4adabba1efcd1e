"""Time of one optimizer update on the shapes of gpt2-124m: ours against optax.adamw and torch.optim.AdamW (foreach).

    python benchmarks/optimizers.py [--rounds 9] [--preset gpt2-124m]

Parameters, gradients and state are float32 and live in memory (4 bytes x 124 M each); parameters and state are donated.
All take turns, after two updates of warm-up each; printed are medians and their ratio to optax.adamw.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import torch

import jaxlm
from jaxlm import optim
from jaxlm.model.build import build_model, init_params
from jaxlm.optim.param_kinds import decay_mask

RATE, DECAY = 6e-4, 0.1
BASELINE = "optax.adamw"
OPTIMIZERS = {
    BASELINE: lambda: optax.adamw(RATE, 0.9, 0.95, weight_decay=DECAY, mask=decay_mask),
    "jaxlm adamw": lambda: optim.adamw(RATE, 0.9, 0.95, weight_decay=DECAY),
    "jaxlm adamw, mu in bfloat16": lambda: optim.adamw(RATE, 0.9, 0.95, weight_decay=DECAY, mu_dtype=jnp.bfloat16),
    "jaxlm adamsn": lambda: optim.adamsn(10 * RATE, 0.9, 0.95, weight_decay=DECAY),
    "jaxlm adafactor": lambda: optim.adafactor(RATE, 0.95, weight_decay=DECAY),
    "jaxlm sgd": lambda: optim.sgd(RATE),
}


def jax_update(tx: optax.GradientTransformation, shapes) -> tuple[Callable[[], None], int]:
    """A function that takes one step of `tx`, and the bytes of its state."""
    make = jax.jit(lambda seed: jax.tree.map(lambda leaf: jnp.full(leaf.shape, seed, leaf.dtype), shapes))
    params, grads = make(0.02), make(1e-3)
    state = jax.jit(tx.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def update() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state, grads))

    return update, optim.state_bytes(tx, shapes)


def torch_update(shapes) -> tuple[Callable[[], None], int]:
    """The same of torch.optim.AdamW, its foreach form, decay on matrices only."""
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    leaves, decays = jax.tree.leaves(shapes), jax.tree.leaves(decay_mask(shapes))
    params = [torch.full(leaf.shape, 0.02, device=device, requires_grad=True) for leaf in leaves]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    groups = [
        {"params": [p for p, d in zip(params, decays, strict=True) if d is wanted], "weight_decay": DECAY * wanted}
        for wanted in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), foreach=True)

    def update() -> None:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return update, 2 * sum(4 * param.numel() for param in params)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--preset", default="gpt2-124m")
    arguments = parser.parse_args()
    model = build_model(jaxlm.preset(arguments.preset).model)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    device = jax.devices()[0].device_kind
    print(f"{device}, {torch.get_num_threads()} threads, jax {jax.__version__}, optax {optax.__version__}, ", end="")
    print(f"torch {torch.__version__}; {arguments.preset}: {count:,} parameters, float32")
    print(f"median of {arguments.rounds} updates after 2 of warm-up, least and most; each in turn with {BASELINE}")
    print(f"{'':30}{'ms':>8}{'least':>8}{'most':>8}{'ratio':>7}{'state MB':>10}")
    baseline, baseline_bytes = jax_update(OPTIMIZERS[BASELINE](), shapes)
    others = {name: functools.partial(jax_update, make(), shapes) for name, make in OPTIMIZERS.items()}
    others["torch.optim.AdamW (foreach)"] = functools.partial(torch_update, shapes)
    for name, make in others.items():
        update, size = (baseline, baseline_bytes) if name == BASELINE else make()
        rounds = []
        for _ in range(2 + arguments.rounds):
            rounds.append([_seconds(update), _seconds(baseline)])
        ours, theirs = (sorted(column) for column in zip(*rounds[2:], strict=True))
        middle = statistics.median(ours)
        ratio = middle / statistics.median(theirs)
        print(f"{name:30}{middle * 1e3:8.1f}{ours[0] * 1e3:8.1f}{ours[-1] * 1e3:8.1f}{ratio:7.2f}{size / 1e6:10.1f}")


def _seconds(update: Callable[[], None]) -> float:
    started = time.perf_counter()
    update()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
