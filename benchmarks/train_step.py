"""Time of a training step (forward, backward, clipping, AdamW), jaxlm against Hugging Face GPT-2 in eager PyTorch.

Both train the `nanogpt-cpu` size (4 layers, width 128, context 64, batch 12) on the same tokens, in turn, in one
process. Prints device, versions, warm-up and the median of the rounds; the ratio is the claim, not the milliseconds.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxlm.config import OptimConfig
from jaxlm.config.presets import preset
from jaxlm.data.batches import TokenStream
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.loop import make_chunk
from jaxlm.training.step import init_state


def jaxlm_steps(tokens: np.ndarray) -> Callable[[int], None]:
    """A function that takes so many steps in the compiled loop, starting where it stopped."""
    config = preset("nanogpt-cpu")
    model, tx = build_model(config.model), build_optimizer(config.optim, 1_000_000)
    chunk = make_chunk(model, tx, config.train)
    source = TokenStream(jnp.asarray(tokens), config.model.max_seq_len)
    state = init_state(init_params(model, jax.random.key(0)), tx)

    def run(steps: int) -> None:
        nonlocal state
        state, metrics = chunk(state, source, int(state.step) + steps)
        jax.block_until_ready(metrics)

    return run


def torch_steps(tokens: np.ndarray) -> Callable[[int], None]:
    """The same for transformers' GPT-2 and torch.optim.AdamW."""
    optim, cfg = OptimConfig(), preset("nanogpt-cpu").model
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu"}
    sizes = {
        "n_positions": cfg.max_seq_len,
        "n_embd": cfg.embed_dim,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
    }
    special = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=65, **sizes, **rates, **special))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(optim.b1, optim.b2), weight_decay=0.1)
    text, generator = torch.tensor(tokens, dtype=torch.long), torch.Generator().manual_seed(0)

    def run(steps: int) -> None:
        for _ in range(steps):
            starts = torch.randint(len(text) - cfg.max_seq_len, (12,), generator=generator)
            windows = text[starts[:, None] + torch.arange(cfg.max_seq_len + 1)]
            optimizer.zero_grad()
            logits = model(windows[:, :-1]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each, in turn")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    arguments = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint8)
    contestants = {"jaxlm": jaxlm_steps(tokens), "GPT2LMHeadModel (eager)": torch_steps(tokens)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run(arguments.steps)  # warm-up and compilation
    for _ in range(arguments.rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run(arguments.steps)
            times[name].append((time.perf_counter() - started) / arguments.steps)
    device = jax.devices()[0]
    print(
        f"{device.device_kind} ({platform.processor() or platform.machine()}), {torch.get_num_threads()} torch threads"
    )
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, float32")
    print(f"warm-up {arguments.steps} steps, then {arguments.rounds} rounds of {arguments.steps} in turn")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:26} median {1e3 * medians[name]:6.1f} ms  ({1e3 * min(values):.1f} to {1e3 * max(values):.1f})")
    ours, theirs = medians.values()
    print(f"jaxlm takes {ours / theirs:.2f} times as long a step")


if __name__ == "__main__":
    main()
