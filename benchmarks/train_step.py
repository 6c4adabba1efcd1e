"""Time of a training step (forward, backward, clipping, AdamW): jaxlm against PyTorch models of the same size.

Every contestant runs in a process of its own and trains on the same text with the same batch size, in float32 and
without dropout. After a round that compiles and warms up, they take turns; a ratio compares the times of one round.
PyTorch's contestants, each eager and by torch.compile (which needs a C++ compiler), all with fused AdamW:

  torch    a transformer from the pieces of torch.nn with fused attention (benchmarks/torch_models.py)
  hf       Hugging Face's GPT-2, or its Llama for llama-char, whose windows it does not have
  nanogpt  nanoGPT's own model.py, with --against FOLDER

  python benchmarks/train_step.py --preset nanogpt-cpu chargpt --json train_step.json

FLOPs of a token are 6 N + 12 N_heads H min(T, W) a layer: N counts the weights of matrix products, the head's included,
and scores above the diagonal count, for every contestant alike. The peak is a product of two large matrices in JAX.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from common import (
    Reply,
    environment,
    environment_lines,
    idle_line,
    progress,
    serve,
    speed_ratios,
    spread,
    started,
    take_turns,
    train_flops_per_token,
    write_json,
)

from jaxlm.config import ExperimentConfig
from jaxlm.config.presets import preset

STEPS = {"nanogpt-cpu": 20, "llama-char": 20, "chargpt": 2, "shakespeare-char": 1, "gpt2-124m": 1}
"""The presets, and steps a round: a second or more."""

NAMES = {
    "jaxlm": "jaxlm",
    "torch": "torch.nn, eager",
    "torch-compiled": "torch.nn, compiled",
    "hf": "Hugging Face, eager",
    "hf-compiled": "Hugging Face, compiled",
    "nanogpt": "nanoGPT, eager",
    "nanogpt-compiled": "nanoGPT, compiled",
}
PEERS = [name for name in NAMES if name != "jaxlm"]


def setting(name: str, smoke: bool) -> ExperimentConfig:
    """The preset without dropout, at a constant rate, and in steps of one batch; with `smoke` a very small one."""
    config = preset(name)
    off = dict.fromkeys(("dropout", "attention_dropout", "embedding_dropout"), 0.0)
    model = dataclasses.replace(config.model, **off)
    batch = config.train.batch_size if name != "gpt2-124m" else 1
    if smoke:
        batch, vocab = 4, min(model.vocab_size, 65)
        model = dataclasses.replace(model, max_seq_len=16, num_layers=1, embed_dim=48, vocab_size=vocab)
    optim = dataclasses.replace(config.optim, schedule="constant", warmup_steps=0)
    train = dataclasses.replace(config.train, batch_size=batch, grad_accum=1)
    return dataclasses.replace(config, model=model, optim=optim, train=train)


def text(vocab_size: int) -> np.ndarray:
    """A million tokens; after each one four others are possible, so that a loss near ln 4 = 1.39 can be learned."""
    steps = np.random.default_rng(0).integers(1, 5, 1_000_000)
    return (np.cumsum(steps) % vocab_size).astype(np.uint16 if vocab_size > 256 else np.uint8)


def jaxlm_contestant(config: ExperimentConfig, smoke: bool) -> Callable[..., Reply]:
    """Takes so many steps in the compiled loop of `jaxlm train`, starting where it stopped, or measures facts."""
    import jax
    import jax.numpy as jnp

    from jaxlm.data.batches import TokenStream
    from jaxlm.model.build import build_model, init_params
    from jaxlm.optim import build_optimizer
    from jaxlm.training.loop import make_chunk
    from jaxlm.training.step import init_state

    cfg = config.model
    model, tx = build_model(cfg), build_optimizer(config.optim, 1_000_000)
    chunk = make_chunk(model, tx, config.train)
    source = TokenStream(jnp.asarray(text(cfg.vocab_size)), cfg.max_seq_len)
    state = init_state(init_params(model, jax.random.key(0)), tx)

    def answer(steps: int = 0, facts: bool = False) -> Reply:
        nonlocal state
        if facts:
            return {"flops_per_token": train_flops_per_token(cfg), "peak_flops": peak_flops(256 if smoke else 2048)}
        started = time.perf_counter()
        state, metrics = chunk(state, source, int(state.step) + steps)
        jax.block_until_ready((state, metrics))
        return {"seconds": time.perf_counter() - started, "loss": float(metrics.loss)}

    return answer


def peak_flops(size: int) -> float:
    """FLOPs a second of a float32 product of two matrices, the best of 9."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def torch_contestant(name: str, config: ExperimentConfig, against: str | None) -> Callable[..., Reply]:
    """The same steps of a PyTorch model."""
    import torch
    import torch_models

    kind, _, compiled = name.partition("-")
    makers = {"torch": torch_models.fused, "hf": torch_models.hugging_face}
    makers["nanogpt"] = functools.partial(torch_models.nanogpt, folder=against or "")
    torch.manual_seed(0)
    model, loss_of = makers[kind](config.model)
    if compiled:
        loss_of = torch.compile(loss_of)
    optimizer = torch_models.adamw(model, config.optim)
    tokens, length = torch.tensor(text(config.model.vocab_size), dtype=torch.long), config.model.max_seq_len
    generator = torch.Generator().manual_seed(0)

    def answer(steps: int) -> Reply:
        started = time.perf_counter()
        for _ in range(steps):
            starts = torch.randint(len(tokens) - length, (config.train.batch_size, 1), generator=generator)
            windows = tokens[starts + torch.arange(length + 1)]
            optimizer.zero_grad()
            loss = loss_of(windows[:, :-1], windows[:, 1:])
            loss.backward()
            if config.optim.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
        return {"seconds": time.perf_counter() - started, "loss": loss.item()}

    return answer


def prepare(contestant: str, preset: str, smoke: bool, against: str | None) -> Callable[..., Reply]:
    """What a worker does: its contestant."""
    config = setting(preset, smoke)
    return jaxlm_contestant(config, smoke) if contestant == "jaxlm" else torch_contestant(contestant, config, against)


def race(name: str, contestants: list[str], steps: int, rounds: int, smoke: bool, against: str | None) -> Reply:
    """All contestants on one preset: warm-up, then `rounds` rounds in turn."""
    specs = {key: {"contestant": key, "preset": name, "smoke": smoke, "against": against} for key in contestants}
    requests = {key: [{"steps": steps}] for key in contestants}
    with started(__file__, specs, requests, name) as (workers, first, failed):
        facts = workers["jaxlm"].ask(facts=True) if "jaxlm" in workers else {}
        progress(f"{name}: {rounds} rounds of {steps} steps")
        replies, failed_later = take_turns(workers, requests, rounds)
        idle = idle_line(workers)
    failed |= failed_later
    if "jaxlm" in failed:
        raise SystemExit(f"error: jaxlm did not run: {failed['jaxlm']}")
    seconds = {key: [reply["seconds"] / steps for [reply] in rows] for key, rows in replies.items()}
    rows: Reply = {}
    for contestant in contestants:
        if contestant in failed:
            rows[contestant] = {"not_available": failed[contestant]}
            continue
        rows[contestant] = {
            "seconds_a_step": seconds[contestant],
            "jaxlm_times_as_fast": speed_ratios(seconds["jaxlm"], seconds[contestant]),
            "ready_seconds": first[contestant][0]["ready_seconds"],
            "loss": replies[contestant][-1][0]["loss"],
        }
    return {**facts, "steps_a_round": steps, "idle": idle, "contestants": rows}


def headline(name: str, found: Reply) -> str:
    """The fastest contestant of PyTorch, and the ratio to it."""
    ran = {key: row for key, row in found["contestants"].items() if key != "jaxlm" and "not_available" not in row}
    if not ran:
        return f"{name}: no contestant of PyTorch ran"
    fastest = min(ran, key=lambda key: median(ran[key]["jaxlm_times_as_fast"]))
    ratios = spread(ran[fastest]["jaxlm_times_as_fast"], 2)
    return f"{name}: the fastest of PyTorch is {NAMES[fastest]}; jaxlm is {ratios} times as fast"


def table(name: str, found: Reply, smoke: bool) -> str:
    """A preset's rows."""
    config = setting(name, smoke)
    cfg, batch = config.model, config.train.batch_size
    flops, peak = found["flops_per_token"], found["peak_flops"]
    lines = [
        f"{name}: batches of {batch} x {cfg.max_seq_len} tokens, {cfg.num_layers} layers of {cfg.embed_dim}, "
        f"{found['steps_a_round']} steps a round, {flops / 1e6:.2f} MFLOP a token",
        f"float32 product {peak / 1e9:.0f} GFLOP/s; {found['idle']}",
        f"{'':24}{'tokens/s':>9}  {'ms a step':30}{'jaxlm times as fast':26}{'of peak':>8}{'ready s':>9}{'loss':>7}",
    ]
    for contestant, row in found["contestants"].items():
        if "not_available" in row:
            lines.append(f"{NAMES[contestant]:24}not available: {row['not_available']}")
            continue
        seconds = row["seconds_a_step"]
        speed = batch * cfg.max_seq_len / median(seconds)
        ratios = "" if contestant == "jaxlm" else spread(row["jaxlm_times_as_fast"], 2)
        lines.append(
            f"{NAMES[contestant]:24}{speed:>9.0f}  {spread(seconds, 2, 1e3):30}{ratios:26}"
            f"{speed * flops / peak:>8.0%}{row['ready_seconds']:>9.1f}{row['loss']:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=STEPS, help="all of these")
    parser.add_argument("--rounds", type=int, help="timed rounds of each, in turn; 7")
    parser.add_argument("--steps", type=int, help="steps a round; by default what takes a second or more")
    parser.add_argument("--contestants", nargs="+", choices=PEERS, help="those beside jaxlm; all")
    parser.add_argument("--against", metavar="FOLDER", help="your copy of nanoGPT, which has model.py")
    parser.add_argument("--json", metavar="FILE", help="also write every number there")
    parser.add_argument("--smoke", action="store_true", help="very small sizes, one round: does the script run?")
    parser.add_argument("--worker", metavar="SPEC", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(prepare, arguments.worker)
        return
    if arguments.against and not Path(arguments.against, "model.py").is_file():
        parser.error(f"--against {arguments.against}: there is no model.py; give the folder of a copy of nanoGPT")
    peers = arguments.contestants or [name for name in PEERS if arguments.against or "nanogpt" not in name]
    if not arguments.against and any("nanogpt" in name for name in peers):
        parser.error("--contestants nanogpt: say with --against FOLDER where nanoGPT's model.py is")
    smoke = arguments.smoke
    rounds = arguments.rounds or (1 if smoke else 7)
    report: Reply = {"environment": environment("jax", "jaxlib", "torch", "transformers"), "rounds": rounds}
    presets = arguments.preset or (["nanogpt-cpu"] if smoke else list(STEPS))
    found = {}
    for name in presets:
        steps = arguments.steps or (2 if smoke else STEPS[name])
        found[name] = race(name, ["jaxlm", *peers], steps, rounds, smoke, arguments.against)
        write_json(arguments.json, report | {"presets": found})
    if smoke:
        print("very small sizes: these numbers say nothing about speed")
    for name in presets:
        print(headline(name, found[name]))
    print(f"\n{environment_lines(report['environment'])}")
    print(
        f"medians (least to most) of {rounds} rounds in turn, one process each; ready: up to the end of the first round"
    )
    for name in presets:
        print(f"\n{table(name, found[name], smoke)}")


if __name__ == "__main__":
    main()
