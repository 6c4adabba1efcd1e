"""Learning-rate schedules: functions of the number of steps already taken."""

import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig
from jaxlm.errors import UserError


def build_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The rate of step t = 0, 1, ...: a linear warm-up, then `cfg.schedule`.

    Warm-up gives peak * (t + 1) / (warmup_steps + 1), so no step has rate 0 and step `warmup_steps` has the peak.
    After it, "cosine" falls to min_lr_ratio * peak at t = steps, "constant" stays, and "rsqrt" is
    peak * sqrt((warmup_steps + 1) / (t + 1)). With cfg.schedule_steps that takes the place of
    steps, and from there on the rate stays.

    Raises:
      UserError: a warm-up as long as the run.
    """
    warmup, peak, steps = cfg.warmup_steps, cfg.learning_rate, cfg.schedule_steps or steps
    if warmup >= steps:
        raise UserError(
            f"warmup_steps = {warmup} is not below steps = {steps}: "
            "give a smaller --optim.warmup-steps, or more --train.steps"
        )
    if cfg.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, steps, peak * cfg.min_lr_ratio)
    else:
        after = optax.constant_schedule(peak)
        if cfg.schedule == "rsqrt":

            def after(count):
                return peak * jnp.sqrt((warmup + 1) / (count + warmup + 1))

        schedule = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])
    # Of an int32 count Optax computes a float32 rate, in 64-bit JAX too.
    return lambda count: schedule(jnp.asarray(count, float))
