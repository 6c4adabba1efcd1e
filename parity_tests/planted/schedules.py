"""Learning-rate schedules: where they begin, how they fall, where they end."""

from typing import Any

from jaxlm.config import OptimConfig
from jaxlm.optim import build_optimizer, build_schedule
from planted.bugs import Bug, Edit, edit


def rates(name: str, what: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Bug:
    """A bug of the rates of a run of 20 steps."""
    fields = {"name": "sgd", "weight_decay": 0.0, "clip_norm": None, "warmup_steps": 4, **fields}
    options = (("steps", 20),)
    return Bug(name, what, layer, cause, edits, fields, "schedule", OptimConfig, "schedule", options=options)


BUGS = [
    rates(
        "warm-up from zero",
        "The first step has rate 0.",
        "warm-up", "begins at 0!",
        edit(build_schedule, "warmup_cosine_decay_schedule(peak / (warmup + 1), peak,",
             "warmup_cosine_decay_schedule(0.0, peak,"),
    ),
    rates(
        "warm-up one step late",
        "The rate rises a step later than it should.",
        "warm-up", "one step late!",
        edit(build_schedule, "schedule(jnp.asarray(count, float))", "schedule(jnp.maximum(count, 1.0) - 1)"),
        schedule="rsqrt",
    ),
    rates(
        "cosine to zero",
        "The cosine ends at 0: min_lr_ratio is ignored.",
        "cosine", "min_lr_ratio ignored!",
        edit(build_schedule, "peak * cfg.min_lr_ratio", "0.0"),
    ),
    rates(
        "cosine to the ratio itself",
        "The cosine ends at the rate min_lr_ratio, not at that share of the peak.",
        "cosine", "taken as the rate!",
        edit(build_schedule, "peak * cfg.min_lr_ratio", "cfg.min_lr_ratio"), learning_rate=0.5,
    ),
    rates(
        "cosine that ends a step early",
        "The last but one step has the final rate already.",
        "cosine", "a step early!",
        edit(build_schedule, "warmup, steps, floor", "warmup, steps - 1, floor"),
    ),
    rates(
        "cosine longer than the run",
        "The decay takes all steps of the run, though it begins after the warm-up.",
        "cosine", "warmup_steps late!",
        edit(build_schedule, "warmup, steps, floor", "warmup, steps + warmup, floor"),
    ),
    rates(
        "rsqrt from step 0",
        "The reciprocal root is that of the steps since the warm-up, as if there had been none.",
        "rsqrt", "decay counted from step 0!",
        edit(build_schedule, "jnp.sqrt((warmup + 1) / (count + warmup + 1))", "jnp.sqrt(1 / (count + 1))"),
        schedule="rsqrt",
    ),
    rates(
        "rates in float32",
        "The rate is computed of an integer count, and so in float32.",
        "warm-up", "float32!",
        edit(build_schedule, "schedule(jnp.asarray(count, float))", "schedule(count).astype('float32').astype(float)"),
        schedule="constant",
    ),
    rates(
        "schedule a step ahead of the optimizer",
        "Each step of the optimizer has the rate of the step after.",
        "optimizer", "rate of the step after!",
        edit(build_optimizer, "make(schedule, ", "make(lambda count: schedule(count + 1), "),
    ),
]  # fmt: skip
