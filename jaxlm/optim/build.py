"""From an OptimConfig to the chain that turns gradients into updates."""

import difflib
import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxlm.config.base import FLOAT32_MAX
from jaxlm.config.optim import OptimConfig, optimizer_fields
from jaxlm.errors import UserError
from jaxlm.optim.adafactor import adafactor
from jaxlm.optim.adam import adamw
from jaxlm.optim.adamsn import adamsn
from jaxlm.optim.schedules import build_schedule
from jaxlm.optim.sgd import sgd
from jaxlm.optim.transforms import decay_parameters, skip_nonfinite
from jaxlm.types import Params, tree_bytes

Factory = Callable[..., optax.GradientTransformation]

OURS: dict[str, Factory] = {"sgd": sgd, "adam": adamw, "adamw": adamw, "adamsn": adamsn, "adafactor": adafactor}
"""Every one applies weight_decay; "adam" is AdamW, whose weight_decay is 0 unless one is given."""

PYTHON_WORDS = {"True": True, "False": False, "None": None}
"""Python's spelling of values that JSON spells otherwise. As a string, "False" would count as true."""


def build_optimizer(cfg: OptimConfig, steps: int, params: Params | None = None) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer with its schedule over `steps` steps and decoupled weight decay.

    The optimizer is jaxlm's of that name, else Optax's (`optax.NAME`, then `optax.contrib.NAME`). With max_nonfinite
    the whole chain is wrapped in `skip_nonfinite`. Without it, a gradient that is not finite reaches the parameters,
    and the training loop must stop, as `jaxlm.train` does.

    Args:
      params: parameters, or their shapes. One step is traced on them, so that an optimizer that cannot run fails here.

    Raises:
      UserError: no optimizer has this name; it does not work with these arguments, a schedule and `params`; the
        schedule does not fit `steps`.
    """
    schedule = build_schedule(cfg, steps)
    make, arguments = _factory(cfg.name), _arguments(cfg)
    fields = {name: getattr(cfg, name) for name in optimizer_fields(cfg.name)}
    ours = cfg.name in OURS
    assert cfg.weight_decay is not None  # a config holds the number that None stands for
    if "weight_decay" in inspect.signature(make).parameters:
        fields["weight_decay"] = cfg.weight_decay if ours else 0.0
    decay = optax.identity() if ours else decay_parameters(cfg.weight_decay, schedule)
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    try:
        tx = optax.chain(clip, make(schedule, **fields, **arguments), decay)
        if cfg.max_nonfinite:
            tx = skip_nonfinite(tx, cfg.max_nonfinite)
        if params is not None:
            _try_out(tx, params)
    except Exception as error:  # whatever an optimizer from elsewhere does with what it is given
        given = f" with {' '.join(cfg.arguments)}" if cfg.arguments else ""
        raise UserError(f"optim.name = {cfg.name!r} does not run{given} ({error}): choose another") from error
    return tx


def state_bytes(tx: optax.GradientTransformation, params: Params) -> int:
    """Bytes of an optimizer's state for these parameters (arrays or their shapes), counted from what `init` returns."""
    return tree_bytes(jax.eval_shape(tx.init, params))


def _factory(name: str) -> Factory:
    if name in OURS:
        return OURS[name]
    import optax.contrib

    if name.startswith("schedule_free"):
        raise UserError(f"optim.name = {name!r} evaluates other parameters than it trains: choose another")
    known = {n: value for module in (optax.contrib, optax) for n, value in vars(module).items() if _fits(n, value)}
    if name not in known:
        close = difflib.get_close_matches(name, [*OURS, *known], n=1)
        raise UserError(
            f"optim.name = {name!r} is not an optimizer of jaxlm or Optax: choose one of {', '.join(OURS)}, or one of "
            f"Optax's, such as {close[0] if close else 'lion'}"
        )
    return known[name]


def _fits(name: str, value: Any) -> bool:
    """Whether an object in Optax is an optimizer whose first argument is the learning rate."""
    whole = value.func if isinstance(value, functools.partial) else value  # nadamw is a partial adamw
    if not inspect.isfunction(whole) or name.startswith(("_", "scale_by")):
        return False
    return next(iter(inspect.signature(value).parameters), None) == "learning_rate"


def _arguments(cfg: OptimConfig) -> dict[str, Any]:
    """The optimizer's further arguments. Each is NAME=VALUE, with a value in JSON, one of PYTHON_WORDS, or a string."""
    own = {"learning_rate", "weight_decay", *optimizer_fields(cfg.name)}
    known = [name for name in inspect.signature(_factory(cfg.name)).parameters if name not in {*own, "mask", "kinds"}]
    arguments = {}
    for argument in cfg.arguments:
        name, _, value = argument.partition("=")
        if name not in known:
            why = f"is set by --optim.{name.replace('_', '-')}" if name in own else "is unknown"
            raise UserError(f"argument {name!r} of {cfg.name} {why}: choose one of {', '.join(known)}")
        if not value:
            raise UserError(f"argument {argument!r} of {cfg.name} has no value: give {name}=VALUE")
        try:
            arguments[name] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[name] = PYTHON_WORDS.get(value, value)
        _check_number(argument, name, arguments[name], cfg.name)
    return arguments


def _check_number(argument: str, name: str, value: Any, optimizer: str) -> None:
    """Refuses a number that is not finite in float32, or an eps below 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_word = isinstance(value, str) and value.lower().lstrip("+-") in ("nan", "inf", "infinity")
    if is_word or (is_number and not abs(value) <= FLOAT32_MAX):  # NaN too
        raise UserError(f"argument {argument!r} of {optimizer} is out of range: give a finite number, of float32")
    if is_number and value < 0 and name.startswith("eps"):
        raise UserError(f"argument {argument!r} of {optimizer} is out of range: give at least 0")


def _try_out(tx: optax.GradientTransformation, params: Params) -> None:
    """Traces one step on shapes alone, so that an optimizer that cannot work fails before anything is written."""

    def step(params: Params) -> Params:
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)

    before, after = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, jax.eval_shape(step, params)))
    if before != after:
        raise ValueError("its updates do not have the shapes of the parameters")
