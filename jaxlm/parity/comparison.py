"""What all parts of a comparison share: the model four times, the batches, and when rounding is judged."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model.layer_stack import unstack_params
from jaxlm.parity import causes
from jaxlm.parity.capture import Event
from jaxlm.parity.inputs import Batches, Inputs
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import JaxNetwork, Networks, Pass, TorchNetwork
from jaxlm.parity.report import Divergence, PartResult
from jaxlm.types import Params

MORE = (1, 4, 16)
"""Times as many batches over which rounding errors are averaged, as long as nothing but rounding fails."""


class Comparison:
    """A model and what it reads. Its parts (forward, gradients, updates, decoding) are functions of this."""

    def __init__(self, cfg: ModelConfig, params: Params, batches: Batches, with_grads: bool) -> None:
        self.asked_cfg, self.asked_params = cfg, params
        self.batches, self.with_grads = batches, with_grads
        # Captures do not see inside a scan or a recomputed layer, and cuDNN has no float64: the same function without.
        impl = "auto" if cfg.attention_impl == "cudnn" else cfg.attention_impl
        self.cfg = dataclasses.replace(cfg, scan_layers=False, remat=False, attention_impl=impl)
        self.params = jax.tree.map(np.asarray, unstack_params(cfg, params) if cfg.scan_layers else params)
        self.networks = Networks(self.cfg, self.params)
        self._passes: list[Results] = []

    def row(self, quantity: str, name: str, draws: list[Results], scale: float = 0.0) -> Row:
        """Measures a quantity in the config's type."""
        return measure(quantity, name, draws, self.cfg.dtype, scale)

    def event_rows(self, quantity: str, values: list[Results]) -> list[tuple[Event, Row]]:
        """Measures every event that both frameworks have, given the values by event of each draw."""
        return [
            (event, self.row(quantity, _row_name(event), [pick(draw, event) for draw in values]))
            for event in values[0].jax
            if event in values[0].torch
        ]

    def passes(self, count: int) -> list[Results]:
        """What the networks compute from the first `count` batches, each batch once."""
        for batch in self.batches.first(count)[len(self._passes) :]:
            self._passes.append(self.networks.run(functools.partial(_forward, batch=batch, with_grads=self.with_grads)))
        return self._passes[:count]

    def settled(self, part: Callable[["Comparison", int], PartResult], start: int | None = None) -> PartResult:
        """Compares a part on `start` batches (None = draws), and on more random ones while nothing but rounding fails.

        Rounding errors have long tails: an RMS over one text, one position or one loss says little, for a few large
        errors make it up. A bug needs no second look, float64 shows it.
        """
        # A batch for bfloat16 has so many tokens that few of them suffice.
        for times in MORE[:2] if self.cfg.dtype == "bfloat16" else MORE:
            result = part(self, times * (start or self.batches.draws))
            if result.divergence is None or result.divergence.verdict == "DIFFERS":
                break
        return result

    @functools.cached_property
    def decoding_networks(self) -> Networks:
        """The networks with a cache that overflows, where positions can go on past it."""
        cfg = self.cfg
        if not cfg.has_position_table:
            cfg = dataclasses.replace(cfg, max_seq_len=max(2, 2 * self.batches.length // 3))
        return Networks(cfg, self.params)


def pick(draw: Results, key: Any) -> Results:
    """One entry of each result, results being dicts or sequences."""
    return draw.map(lambda result: result[key])


def with_causes(divergence: Divergence | None, hints: str) -> Divergence | None:
    """The divergence with the causes of this kind, or with those of rounding if it is nothing else."""
    if divergence is None:
        return None
    kind = "rounding" if divergence.verdict == "rounding" else hints
    return dataclasses.replace(divergence, causes=causes.HINTS[kind])


def _row_name(event: Event) -> str:
    return event.layer if event.layer and event.side == "out" and not event.call else str(event)


def _forward(network: JaxNetwork | TorchNetwork, batch: Inputs, with_grads: bool) -> Pass:
    return network.forward(batch.windows, batch.weights, with_grads)
