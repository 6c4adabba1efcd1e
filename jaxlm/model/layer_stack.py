"""The stack of layers: unrolled or scanned, with or without recomputation, and the conversion of their parameters.

Unrolled parameters are named block_0, block_1, ... Stacked ones are named layers/block_j, and each leaf has a leading
axis: entry k of layers/block_j is block_{k * period + j}, where the settings of layers repeat after `period` layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.config.model import LayerSettings
from jaxlm.errors import UserError
from jaxlm.types import Params


def _in_turn(
    layer: type[nn.Module],
    cfg: ModelConfig,
    settings: tuple[LayerSettings, ...],
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"],
    caches: Sequence[Any] | None,
    train: bool,
    *more: Any,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...] | None]:
    """One layer for each of the settings, named block_0, block_1, ...; each takes its cache and returns the new one."""
    new = []
    if cfg.remat:
        layer = nn.remat(layer, prevent_cse=not cfg.scan_layers, static_argnums=(4,))
    for i, own in enumerate(settings):
        cache = None if caches is None else caches[i]
        x, cache = layer(cfg, own, name=f"block_{i}")(x, positions, cache, train, *more)
        new.append(cache)
    return x, None if caches is None else tuple(new)


class Period(nn.Module):
    """One period of the layers' settings: the body of the scan over layers."""

    layer: type[nn.Module]
    cfg: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], caches: Sequence[Any] | None, positions: Int[Array, "#B T"], *more: Any
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...] | None]:
        """Its layers in turn."""
        return _in_turn(self.layer, self.cfg, self.cfg.layer_period, x, positions, caches, self.train, *more)


def apply_layers(
    layer: type[nn.Module],
    cfg: ModelConfig,
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"],
    caches: Sequence[Any] | None,
    train: bool,
    *more: Any,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """The L layers of a model, called inside its compact method.

    Each is `layer(cfg, settings)(x, positions, cache, train, *more)`.

    With scan_layers, one period is compiled and scanned over stacked parameters. The caches stay separate, which costs
    a copy of them on the way in and out.
    """
    if not cfg.scan_layers:
        x, new = _in_turn(layer, cfg, cfg.layer_settings, x, positions, caches, train, *more)
        return x, new or ()
    period = len(cfg.layer_period)
    scanned = nn.scan(
        Period,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, *[nn.broadcast] * len(more)),
        length=cfg.num_layers // period,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(layer, cfg, train, name="layers")
    stacked = None
    if caches is not None:
        stacked = tuple(_stacked(caches[j::period]) for j in range(period))
    x, stacked = scanned(x, stacked, positions, *more)
    if stacked is None:
        return x, ()
    return x, tuple(_at(stacked[i % period], i // period) for i in range(cfg.num_layers))


def stack_params(cfg: ModelConfig, params: Params) -> Params:
    """Parameters for the model with scan_layers, from those of the model without it.

    Raises:
      UserError: a layer is missing or surplus, or layers at the same place in the period differ in shape.
    """
    period = len(cfg.layer_period)
    blocks = _take_blocks(cfg, params, [f"block_{i}" for i in range(cfg.num_layers)])
    if cfg.num_layers % period:
        raise UserError(
            f"num_layers = {cfg.num_layers} is not a multiple of the period {period} of {cfg.periodic}: "
            "such layers cannot be stacked"
        )
    for j, block in enumerate(blocks):
        ours, theirs = (jax.tree.map(jnp.shape, tree) for tree in (block, blocks[j % period]))
        if ours != theirs:
            raise UserError(f"block_{j} has other parameters than block_{j % period}: {ours} against {theirs}")
    layers = {f"block_{j}": _stacked(blocks[j::period]) for j in range(period)}
    return {**{name: leaf for name, leaf in params.items() if not name.startswith("block_")}, "layers": layers}


def unstack_params(cfg: ModelConfig, params: Params) -> Params:
    """Parameters for the model without scan_layers, from those of the model with it: the inverse of `stack_params`.

    Raises:
      UserError: the parameters are not stacked, or their number of layers is not that of the config.
    """
    period = len(cfg.layer_period)
    if "layers" not in params:
        raise UserError(f"the parameters are not stacked: they have {', '.join(sorted(params))}, but no 'layers'")
    places = _take_blocks(cfg, params["layers"], [f"block_{j}" for j in range(period)])
    depth = {leaf.shape[0] for leaf in jax.tree.leaves(places)}
    if depth != {cfg.num_layers // period}:
        raise UserError(
            f"the stacked parameters hold {sorted(depth)} periods of {period} layers, num_layers = {cfg.num_layers} "
            f"needs {cfg.num_layers // period}"
        )
    blocks = {f"block_{i}": _at(places[i % period], i // period) for i in range(cfg.num_layers)}
    return {**{name: leaf for name, leaf in params.items() if name != "layers"}, **blocks}


def unrolled(model: nn.Module, params: Params) -> tuple[Any, Params]:
    """The same model and parameters without scan_layers, so that a decoding step does not copy the cache."""
    if not model.cfg.scan_layers:
        return model, params
    cfg = model.cfg
    return model.clone(cfg=dataclasses.replace(cfg, scan_layers=False)), _unstack(cfg, params)


_unstack = jax.jit(unstack_params, static_argnums=0)


def _take_blocks(cfg: ModelConfig, params: Params, names: list[str]) -> list[Params]:
    layers = {name for name in params if name.startswith("block_")}
    if layers != set(names):
        raise UserError(
            f"the parameters have the layers {', '.join(sorted(layers)) or 'none'}; num_layers = {cfg.num_layers} and "
            f"{cfg.periodic} need {', '.join(names)}"
        )
    return [params[name] for name in names]


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)
