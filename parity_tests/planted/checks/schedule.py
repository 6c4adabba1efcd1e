"""Learning rates against torch.optim.lr_scheduler, and the steps that SGD takes with them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.optim import lr_scheduler

from jaxlm.config import OptimConfig
from jaxlm.optim import build_optimizer, build_schedule
from jaxlm.parity import Report
from jaxlm.parity.measure import FLOAT64, Results, measure
from jaxlm.parity.networks import computing
from jaxlm.parity.report import Divergence

HINTS = (
    "warm-up off by one: no step has rate 0, step warmup_steps has the peak",
    "decay to the wrong end, or counted from another step",
    "a rate computed in float32",
    "an optimizer that counts its steps otherwise than the schedule",
)


def check_schedule(cfg: OptimConfig, steps: int) -> Report:
    """Compares the rate of every step, then the steps of SGD on a gradient of ones."""
    with computing("float64"):
        schedule = build_schedule(cfg, steps)
        rates = np.array([float(schedule(jnp.int32(step))) for step in range(steps + 1)])
        taken = _steps_taken(cfg, steps)
    expected = _in_torch(cfg, steps)
    rows = [
        measure("schedule", "rates", [Results(rates, expected)], "float64"),
        measure("schedule", "steps of SGD", [Results(taken, expected[:steps])], "float64"),
    ]
    for row, ours in zip(rows, (rates, taken), strict=True):
        if not row.passed:
            first = int(np.argmax(~(np.abs(ours - expected[: len(ours)]) <= FLOAT64 * cfg.learning_rate)))
            layer = "optimizer" if row is rows[1] else "warm-up" if first <= cfg.warmup_steps else cfg.schedule
            where = f"the rate of step {first} is {ours[first]:.6g}, not {expected[first]:.6g}"
            return Report(tuple(rows), Divergence("schedule", layer, True, where, (*_tried(cfg, steps, ours), *HINTS)))
    return Report(tuple(rows))


def _steps_taken(cfg: OptimConfig, steps: int) -> np.ndarray:
    """How far each step goes down a gradient of ones."""
    tx = build_optimizer(cfg, steps)
    params = {"kernel": jnp.zeros((2, 3))}
    state, taken = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        taken.append(-np.asarray(updates["kernel"])[0, 0])
    return np.array(taken)


def _in_torch(cfg: OptimConfig, steps: int) -> np.ndarray:
    """The rates 0 to `steps` of torch's own schedulers, one after the other."""
    warmup, decay = cfg.warmup_steps, round(cfg.decay_share * steps)
    after: dict[str, Callable[[Any], Any]] = {
        "cosine": lambda tx: lr_scheduler.CosineAnnealingLR(tx, steps - warmup, cfg.learning_rate * cfg.min_lr_ratio),
        "linear": lambda tx: lr_scheduler.LinearLR(tx, 1.0, cfg.min_lr_ratio, steps - warmup),
        "wsd": lambda tx: lr_scheduler.LinearLR(tx, 1.0, cfg.min_lr_ratio, decay),
        "constant": lambda tx: lr_scheduler.ConstantLR(tx, 1.0),
        "rsqrt": lambda tx: lr_scheduler.LambdaLR(tx, lambda t: math.sqrt((warmup + 1) / (t + warmup + 1))),
    }
    rates: list[float] = []
    parts = [(after[cfg.schedule], steps + 1 - warmup)]
    if cfg.schedule == "wsd":
        parts = [(after["constant"], steps - decay - warmup), (after["wsd"], decay + 1)]
    if warmup:
        parts.insert(0, (lambda tx: lr_scheduler.LinearLR(tx, 1 / (warmup + 1), 1.0, warmup), warmup))
    for make, count in parts:
        tx = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], cfg.learning_rate)
        scheduler = make(tx)
        for _ in range(count):
            rates.append(tx.param_groups[0]["lr"])
            tx.step()
            scheduler.step()
    return np.array(rates)


def _tried(cfg: OptimConfig, steps: int, found: np.ndarray) -> list[str]:
    """Wrong schedules that give what was found."""
    peak, warmup, floor = cfg.learning_rate, cfg.warmup_steps, cfg.learning_rate * cfg.min_lr_ratio

    def rising(t: int) -> float:
        return peak * (t + 1) / (warmup + 1)

    def curve(
        first: Callable[[int], float] = rising, start: int = warmup, stop: int = steps, low: float = floor
    ) -> list[float]:
        """The schedule with another warm-up, and with a decay counted from `start` to `stop`."""

        def decay(t: int) -> float:
            if cfg.schedule == "constant":
                return peak
            if cfg.schedule == "rsqrt":
                return peak * math.sqrt((start + 1) / (t - warmup + start + 1))
            if cfg.schedule == "wsd":
                begin = stop - round(cfg.decay_share * stop)
                return peak if t < begin else low + (peak - low) * max(0.0, (stop - t) / (stop - begin))
            share = min(1.0, (t - start) / (stop - start))
            if cfg.schedule == "linear":
                return low + (peak - low) * (1 - share)
            return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2

        return [first(t) if t < warmup else decay(t) for t in range(steps + 1)]

    traps = {
        "warm-up that begins at 0": curve(lambda t: peak * t / max(warmup, 1)),
        "warm-up one step late: the first two steps have one rate": [curve()[0], *curve()[:-1]],
        "min_lr_ratio ignored: the decay ends at 0": curve(low=0.0),
        "min_lr_ratio taken as the rate": curve(low=cfg.min_lr_ratio),
        "decay that ends a step early": curve(stop=steps - 1),
        "decay that ends warmup_steps late": curve(stop=steps + warmup),
        "decay counted from step 0": curve(start=0),
        "rate of the step after": [*curve()[1:], floor],
    }
    count = len(found)
    if np.allclose(found, _in_torch(cfg, steps)[:count], rtol=1e-6, atol=0):
        return ["a rate computed in float32 (tried: the rates agree to 1e-6)"]
    return [
        f"{words} (tried: it gives the rates found)"
        for words, rates in traps.items()
        if np.allclose(rates[: count - 1], found[: count - 1], rtol=0, atol=FLOAT64 * peak)
    ]
