"""How many tokens a cache must hold, and what happens past that."""

import functools
import math
import warnings
from typing import Literal, NamedTuple

import jax

from jaxlm.config import ModelConfig
from jaxlm.decode.checks import check_count
from jaxlm.errors import ContextWarning, PositionTableWarning, UserError
from jaxlm.model.cache import init_cache
from jaxlm.types import Count, Params, tree_bytes

MIN_BUCKET = 16
"""Smaller prompts and caches are padded to this: fewer programs, and no slower."""

MIN_GROWTH, MIN_DOUBLED = 32, 128
"""Slots that a growing cache gains at least, and from which it doubles."""


class CapacityPlan(NamedTuple):
    """How far the cache of a request reaches.

    capacity: tokens that a layer without a window sees at most.
    overflows: whether some layer would see more.
    cached_steps: new tokens that come from the cache. All but where a learned position table ends: what follows there
      is recomputed token by token.
    """

    capacity: int
    overflows: bool
    cached_steps: int


def plan_capacity(
    cfg: ModelConfig,
    longest: int,
    new_tokens: int,
    capacity: Count | None = None,
    on_overflow: Literal["continue", "roll", "error"] = "continue",
) -> CapacityPlan:
    """The plan for prompts of up to `longest` tokens, each continued by `new_tokens`.

    Args:
      capacity: None = min(longest + new_tokens, max_seq_len).
      on_overflow: "error" refuses; "roll" refuses where the cache cannot roll, which is with a learned position table;
        "continue" goes on in any case, with a warning where a table ends, or the context does and no capacity is given.

    Warns:
      PositionTableWarning: text goes on past a learned position table.
      ContextWarning: it goes on past max_seq_len without one, and no capacity was chosen.

    Raises:
      UserError: a capacity that is not a whole number or beyond a learned position table; an overflow that is refused.
    """
    is_chosen = capacity is not None
    if capacity is None:
        capacity = min(longest + new_tokens, cfg.max_seq_len)
    capacity = check_count("capacity", capacity)
    cfg.check_reach(capacity, "give a smaller capacity")
    if cfg.family != "transformer":  # their state has one size
        return CapacityPlan(capacity, False, new_tokens)
    fed = longest + new_tokens - 1  # the last new token is never fed back
    widest = max(math.inf if window is None else window for window in cfg.layer_windows)
    # A full cache may drop what no window reaches any more. A learned table runs out of places whatever the windows.
    overflows = capacity < (fed if cfg.has_position_table else min(widest, fed))
    if not overflows:
        return CapacityPlan(capacity, False, new_tokens)
    numbers = f"prompt {longest} + {new_tokens} new tokens"
    if on_overflow == "error" or (on_overflow == "roll" and cfg.has_position_table):
        fix = ", a larger capacity, or on_overflow = 'continue'" if on_overflow == "error" else ""
        raise UserError(f"{numbers} pass the capacity {capacity}: give fewer{fix}")
    if not cfg.has_position_table:
        if not is_chosen:
            warnings.warn(
                f"{numbers} pass the context of the model (capacity {capacity}, max_seq_len = {cfg.max_seq_len}): from "
                f"there on, each layer sees the latest {capacity} tokens; a larger capacity shows it more, at "
                "positions that it was not trained on",
                ContextWarning,
                stacklevel=5,  # as below
            )
        return CapacityPlan(capacity, True, new_tokens)
    warnings.warn(
        f"{numbers} pass the learned position table (capacity {capacity}, max_seq_len = {cfg.max_seq_len}): from there "
        f"on, each token takes a forward pass over the latest {capacity}",
        PositionTableWarning,
        stacklevel=5,  # who called generate: above it stand request_from and make_request
    )
    # A prompt that fills the table still gives one token from the cache, which is not fed back.
    return CapacityPlan(capacity, True, min(max(capacity - longest + 1, 0), new_tokens))


def cache_capacities(cfg: ModelConfig, params: Params, rows: int, longest: int, plan: CapacityPlan) -> list[int]:
    """The capacities that the cache goes through as it fills: in quarters of the last one, but in MIN_GROWTH at least.

    Below a quarter it doubles from MIN_DOUBLED on, for rows that may be done long before the last token allowed.

    A step reads every slot, filled or not, and all weights. So the first cache is about as large as the weights: a
    smaller one would hardly make a step faster, and needs a program of its own. The last capacity is a power of two
    (but for a given one, or the end of a position table), so that requests of similar length share programs. On a GPU
    or TPU it is the only one: there a program takes half a minute to compile (docs/log.md).
    """
    if cfg.family != "transformer":
        return [1]
    last = plan.capacity
    if not plan.overflows:
        last = cfg.within_reach(power_of_two(max(longest + plan.cached_steps - 1, MIN_BUCKET)))

    def cache_size(capacity: int) -> int:
        return tree_bytes(jax.eval_shape(functools.partial(init_cache, cfg, rows, capacity)))

    growth, weights = max(last // 4, MIN_GROWTH), tree_bytes(params)
    doubled = (1 << n for n in range(MIN_DOUBLED.bit_length() - 1, growth.bit_length()))
    sizes = [*(c for c in doubled if c < growth), *range(growth, last - growth // 2, growth)]
    capacities = [c for c in sizes if c >= longest] + [last]
    while len(capacities) > 1 and cache_size(capacities[1]) <= weights:
        capacities.pop(0)
    return capacities if jax.default_backend() == "cpu" else capacities[-1:]


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
