"""Learning-rate schedules: functions of the number of steps already taken."""

import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig
from jaxlm.errors import UserError


def build_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The rate of step t = 0, 1, ...: a linear warm-up, then `cfg.schedule`.

    Warm-up gives peak * (t + 1) / (warmup_steps + 1), so no step has rate 0 and step `warmup_steps` has the peak.
    After it, "cosine" and "linear" fall to min_lr_ratio * peak at t = steps; "wsd" (Hu et al. 2024,
    https://arxiv.org/abs/2404.06395) keeps the peak and falls linearly to it over the last decay_share * steps steps,
    rounded (the shape of Hagele et al. 2024, https://arxiv.org/abs/2405.18392); "constant" stays; and "rsqrt" is
    peak * sqrt((warmup_steps + 1) / (t + 1)). cfg.schedule_steps, if given, takes the place of steps, and from there on
    the rate stays.

    Raises:
      UserError: a warm-up as long as the run, or a decay that begins before it ends.
    """
    warmup, peak, steps = cfg.warmup_steps, cfg.learning_rate, cfg.schedule_steps or steps
    if warmup >= steps:
        raise UserError(
            f"warmup_steps = {warmup} is not below steps = {steps}: "
            "give a smaller --optim.warmup-steps, or more --train.steps"
        )
    floor, decay_start = peak * cfg.min_lr_ratio, warmup
    if cfg.schedule == "wsd":
        decay_start = steps - max(1, round(cfg.decay_share * steps))
        if decay_start < warmup:
            raise UserError(
                f"decay_share = {cfg.decay_share} of steps = {steps} begins at step {decay_start}, before the warm-up "
                f"of warmup_steps = {warmup} ends: give a smaller --optim.decay-share or --optim.warmup-steps"
            )
    if cfg.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, steps, floor)
    else:
        after = optax.constant_schedule(peak)
        if cfg.schedule in ("linear", "wsd"):  # optax counts the steps before the decay, too
            after = optax.linear_schedule(peak, floor, steps - decay_start, decay_start - warmup)
        if cfg.schedule == "rsqrt":

            def after(count):
                return peak * jnp.sqrt((warmup + 1) / (count + warmup + 1))

        schedule = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])
    # Of an int32 count Optax computes a float32 rate, in 64-bit JAX too.
    return lambda count: schedule(jnp.asarray(count, float))
