"""Time of cached sampling: jaxlm against Hugging Face's GPT-2 and samplers without a cache.

All models have one size (4 layers, width 128, 4 heads, vocabulary 65, float32) and sample at temperature 1 without
filters. Every sampler runs in a process of its own; after calls that compile and warm up they take turns, and a ratio
compares the times of one round. A cached step is (time of all tokens - time of 8) / the tokens between, so that the
cost of a call drops out; 8 is the smallest block that jaxlm scans. A naive step is the time of all steps / their
number. With many rows only some steps are timed: PyTorch's at lengths spread evenly, those of `generate_naive` at the
end, since all of them cost the same (it pads the context).

"compiled" is Hugging Face's `generate` with cache_implementation="static" and torch.compile, which needs a C++
compiler; its prefill is eager, as transformers have it. Compiling is the time of the first call of all tokens less a
later one.

  python benchmarks/decode.py                           the table, prefill of long prompts, and the share of bandwidth
  python benchmarks/decode.py --context                 cached and naive steps by context (rope, batch 1)
  python benchmarks/decode.py --figure docs/decode.png  cost of a token by the tokens so far, with and without window
  python benchmarks/decode.py --layout                  attention alone by memory layout of the cache
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from common import (
    Reply,
    environment,
    environment_lines,
    idle_line,
    serve,
    speed_ratios,
    spread,
    started,
    take_turns,
    write_json,
)

from jaxlm.config import ModelConfig

PROMPT, FEW = 16, 8  # tokens: of a prompt, of the call that is taken off
RECOMPUTES = {
    "jaxlm generate": "nothing",
    "jaxlm generate_naive": "context",
    "jaxlm stream": "nothing",
    "Hugging Face generate": "nothing",
    "Hugging Face compiled": "nothing",
    "Hugging Face naive": "prefix",
    "torchref cached": "nothing",
    "torchref naive": "prefix",
}
"""The samplers, and what each of their steps computes again; "context" is padded to its final length."""

SMOKE = ["jaxlm generate_naive", "Hugging Face compiled", "torchref naive"]
PREFILL = ["jaxlm generate", "Hugging Face generate", "Hugging Face compiled", "torchref cached"]
Sampler = Callable[[int, int], Any]  # length of the prompt, new tokens


def config(context: int, position: str = "learned") -> ModelConfig:
    """The model of every sampler."""
    return ModelConfig(vocab_size=65, max_seq_len=context, position=position)


def jaxlm_sampler(name: str, cfg: ModelConfig, batch: int) -> Sampler:
    """`generate`, `generate_naive` or `stream` of jaxlm."""
    import jax
    import numpy as np

    import jaxlm

    model, sampler = jaxlm.build_model(cfg), getattr(jaxlm, name)
    params = jaxlm.init_params(model, jax.random.key(0))

    def sample(length, new):
        prompt = np.zeros((batch, length), np.int32)
        return list(sampler(model, params, prompt, max_new_tokens=new, key=jax.random.key(0)))

    return sample


def torch_loop(forward: Callable, context: int, batch: int, cached: bool) -> Sampler:
    """The sampler of every tutorial, on a function from tokens to logits; a cached one is fed only the new token."""
    import torch

    @torch.no_grad()
    def sample(length, new):
        tokens = torch.zeros(batch, length, dtype=torch.long)
        for _ in range(new):
            logits = forward(tokens[:, -context:])[:, -1]
            token = torch.multinomial(torch.softmax(logits, dim=-1), 1)
            tokens = token if cached else torch.cat([tokens, token], dim=1)

    return sample


def hugging_face_sampler(name: str, cfg: ModelConfig, batch: int) -> Sampler:
    """GPT-2: its own `generate`, eager or compiled over a static cache, or a loop without a cache."""
    import torch
    import transformers

    sizes = {"vocab_size": cfg.vocab_size, "n_positions": cfg.max_seq_len, "n_embd": cfg.embed_dim}
    blocks = {"n_layer": cfg.num_layers, "n_head": cfg.num_heads, "activation_function": "gelu"}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **blocks, **off)).eval()
    if name == "naive":
        return torch_loop(lambda tokens: model(tokens, use_cache=False).logits, cfg.max_seq_len, batch, cached=False)
    settings = {"do_sample": True, "top_k": 0, "use_cache": True, "pad_token_id": 0}
    if name == "compiled":
        compiling = transformers.CompileConfig(mode="default")
        compiling._compile_all_devices = True  # else transformers compile on accelerators only
        settings |= {"cache_implementation": "static", "compile_config": compiling}

    @torch.no_grad()
    def sample(length, new):
        prompt = torch.zeros(batch, length, dtype=torch.long)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **settings)

    return sample


def torchref_sampler(name: str, cfg: ModelConfig, batch: int) -> Sampler:
    """The plain PyTorch model of torchref, with or without its cache."""
    import torchref

    model = torchref.build_model(cfg).eval()

    def forward(tokens):
        if tokens.shape[1] > 1:  # a prompt
            model.clear_cache()
        return model(tokens, use_kv_cache=True)

    cached = name == "cached"
    return torch_loop(forward if cached else model, cfg.max_seq_len, batch, cached)


def prepare(contestant: str, batch: int, context: int, position: str) -> Callable[..., Reply]:
    """What a worker does: it times calls of its sampler."""
    library, _, name = contestant.rpartition(" ")
    makers = {"jaxlm": jaxlm_sampler, "Hugging Face": hugging_face_sampler, "torchref": torchref_sampler}
    sample = makers[library](name, config(context, position), batch)

    def answer(calls: list[tuple[int, int]]) -> Reply:
        started = time.perf_counter()
        for length, new in calls:
            sample(length, new)
        return {"seconds": time.perf_counter() - started}

    return answer


def some_steps(contestant: str, prompt: int, new: int, steps: int) -> list[tuple[int, int]]:
    """Calls for `steps` of the `new` steps of a naive sampler, which stand for all."""
    if RECOMPUTES[contestant] == "context":
        return [(prompt + new - steps, steps)]
    return [(prompt + int((i + 0.5) * new / steps), 1) for i in range(steps)]


def race(contestants: list[str], setting: Reply, prompt: int, new: int, naive_steps: int, rounds: int) -> Reply:
    """Seconds of each: the first call less a later one, a call for one token, and a step in each round.

    Args:
      setting: batch, context and position of `prepare`.
      new: with 1, only the first token is timed.
    """
    requests, found = {}, {}
    for name in contestants:
        whole = [(prompt, new)]
        if RECOMPUTES[name] != "nothing":
            whole = some_steps(name, prompt, new, naive_steps)
        requests[name] = [{"calls": calls} for calls in (whole, [(prompt, FEW)], [(prompt, 1)])]
        requests[name] = requests[name][:: 1 if new > 1 else 2]
    specs = {name: {"contestant": name, **setting} for name in contestants}
    what = f"batch {setting['batch']}, {prompt} + {new} tokens"
    with started(__file__, specs, requests, what) as (workers, first, failed):
        replies, failed_later = take_turns(workers, requests, rounds)
        found |= {name: {"not_available": reason} for name, reason in (failed | failed_later).items()}
        idle = idle_line(workers)
    for name, rows in replies.items():
        whole, *few, one = zip(*([reply["seconds"] for reply in row] for row in rows), strict=True)
        steps = [seconds / naive_steps for seconds in whole]
        if RECOMPUTES[name] == "nothing" and few:
            steps = [(a - b) / (new - FEW) for a, b in zip(whole, few[0], strict=True)]
        compiling = max(0.0, first[name][0]["seconds"] - median(whole))
        found[name] = {"compiling_seconds": compiling, "first_token_seconds": one, "seconds_a_step": steps}
    ours = found[contestants[0]]
    if "not_available" in ours:
        raise SystemExit(f"error: {contestants[0]} did not run: {ours['not_available']}")
    timed = "seconds_a_step" if new > 1 else "first_token_seconds"
    for row in found.values():
        if "not_available" not in row:
            row["generate_times_as_fast"] = speed_ratios(ours[timed], row[timed])
    return {"idle": idle, "contestants": {name: found[name] for name in contestants}}


def table(batch: int, context: int, contestants: list[str], naive_rows: int, rounds: int) -> Reply:
    """All samplers at one batch size."""
    new = context - PROMPT
    naive_steps = min(new, max(1, naive_rows // batch))
    setting = {"batch": batch, "context": context, "position": "learned"}
    found = race(contestants, setting, PROMPT, new, naive_steps, rounds)
    print(f"\nbatch {batch}, {new} tokens after {PROMPT}; naive ones take {naive_steps} of the steps; {found['idle']}")
    print(f"{'':22}{'compiling s':>11}{'first token ms':>16}  {'ms a step':28}  generate times as fast")
    for name, row in found["contestants"].items():
        if "not_available" in row:
            print(f"{name:22}not available: {row['not_available']}")
            continue
        first = 1e3 * median(row["first_token_seconds"])
        steps, ratios = spread(row["seconds_a_step"], 3, 1e3), spread(row["generate_times_as_fast"], 2)
        ratios = "" if name == contestants[0] else ratios
        print(f"{name:22}{row['compiling_seconds']:>11.2f}{first:>16.2f}  {steps:28}  {ratios}", flush=True)
    return found


def prefill(batches: list[int], length: int, contestants: list[str], rounds: int) -> Reply:
    """The time to the first token after long prompts."""
    chosen, report = [name for name in PREFILL if name in contestants], {}
    if not batches:
        return report
    print(
        f"\nthe first token after {length}\n{'':22}{'batch':>5}{'compiling s':>13}  {'ms':28}  generate times as fast"
    )
    for batch in batches:
        setting = {"batch": batch, "context": length + PROMPT, "position": "learned"}
        report[batch] = race(chosen, setting, length, 1, 1, rounds)
        for name, row in report[batch]["contestants"].items():
            if "not_available" in row:
                print(f"{name:22}{batch:>5}  not available: {row['not_available']}")
                continue
            first, ratios = spread(row["first_token_seconds"], 1, 1e3), spread(row["generate_times_as_fast"], 2)
            ratios = "" if name == chosen[0] else ratios
            print(f"{name:22}{batch:>5}{row['compiling_seconds']:>13.2f}  {first:28}  {ratios}", flush=True)
    return report


def by_context(contexts: list[int], rounds: int) -> Reply:
    """Cached and naive steps from a prompt of 16 to a full context, batch 1."""
    names, report = ["jaxlm generate", "jaxlm generate_naive"], {}
    print("context  naive steps  generate ms  generate_naive ms  times")
    for context in contexts:
        new, naive_steps = context - PROMPT, min(context - PROMPT, 2**15 // context)
        setting = {"batch": 1, "context": context, "position": "rope"}
        report[context] = race(names, setting, PROMPT, new, naive_steps, rounds)
        rows = [report[context]["contestants"][name] for name in names]
        if "not_available" in rows[1]:
            raise SystemExit(f"error: {names[1]} did not run: {rows[1]['not_available']}")
        cached, naive = (1e3 * median(row["seconds_a_step"]) for row in rows)
        times = median(rows[1]["generate_times_as_fast"])
        print(f"{context:>7} {naive_steps:>12} {cached:>12.3f} {naive:>18.3f} {times:>6.1f}", flush=True)
    return report


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each, in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="of the table")
    parser.add_argument(
        "--contestants", nargs="+", choices=list(RECOMPUTES)[1:], help="those beside jaxlm generate; all"
    )
    parser.add_argument("--naive-rows", type=int, default=960, help="rows x steps of a naive sampler's round, at most")
    parser.add_argument(
        "--prefill", type=int, nargs="*", default=[1, 8], help="batches of long prompts; none: left out"
    )
    parser.add_argument("--context", type=int, nargs="*", help="contexts above 24; none given: 64 to 1024")
    parser.add_argument("--figure", help="path of the image")
    parser.add_argument("--tokens", type=int, default=4096, help="of the figure")
    parser.add_argument("--window", type=int, default=128, help="of the figure")
    parser.add_argument("--batch", type=int, default=8, help="of the figure")
    parser.add_argument("--layout", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write every number of the tables there")
    parser.add_argument("--smoke", action="store_true", help="very small sizes, one round: does the script run?")
    parser.add_argument("--worker", metavar="SPEC", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(prepare, arguments.worker)
        return
    rounds, batches, context, length = arguments.rounds, arguments.batches, 256, 1024
    naive_rows, prefill_batches = arguments.naive_rows, arguments.prefill
    if arguments.smoke:
        print("very small sizes: these numbers say nothing about speed")
        rounds, batches, context, length, naive_rows, prefill_batches = 1, [2], 32, 32, 4, [1]
    found = environment("jax", "jaxlib", "torch", "transformers")
    report: Reply = {"environment": found, "rounds": rounds}
    print(f"{environment_lines(found)}\nwarm-up, then medians (least to most) of {rounds} rounds in turn", flush=True)
    if arguments.context is not None:
        report["by_context"] = by_context(arguments.context or [64, 128, 256, 512, 1024], rounds)
    elif arguments.figure or arguments.layout:
        import cache_steps  # JAX in this process

        if arguments.figure:
            cache_steps.by_fill(arguments.figure, arguments.tokens, arguments.window, arguments.batch, rounds)
        else:
            cache_steps.by_layout(rounds)
    else:
        peers = arguments.contestants or (SMOKE if arguments.smoke else list(RECOMPUTES)[1:])
        names = ["jaxlm generate", *peers]
        report["batches"] = {batch: table(batch, context, names, naive_rows, rounds) for batch in batches}
        report["prefill"] = prefill(prefill_batches, length, names, rounds)
        import cache_steps

        rows = {batch: found["contestants"][names[0]] for batch, found in report["batches"].items()}
        steps = {batch: median(row["seconds_a_step"]) for batch, row in rows.items()}
        cache_steps.bandwidth(config(context), steps, (context + PROMPT) // 2)
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
