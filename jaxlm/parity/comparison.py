"""What all parts of a comparison share: the model four times, the batches, and when rounding is judged."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.config import ModelConfig
from jaxlm.model.layer_stack import unstack_params
from jaxlm.parity import causes
from jaxlm.parity.capture import Event
from jaxlm.parity.inputs import Batches, Inputs
from jaxlm.parity.measure import Distances, Results, Row, distances, judge
from jaxlm.parity.networks import JaxNetwork, Network, Networks, Pass, Reference, TorchNetwork, computing
from jaxlm.parity.report import Divergence, PartResult
from jaxlm.types import Params

MORE = (1, 4, 16)
"""Times as many batches over which rounding errors are averaged, as long as nothing but rounding fails."""

GREEDY_TOKENS = 64
"""Tokens sampled greedily from another library's model."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """How far apart what the networks compute from one batch is. The arrays themselves are not kept."""

    values: dict[Event, Distances]
    """Of every event that both have, in JAX's order."""
    logits: Distances
    loss: Distances
    plain_loss: Distances
    grads: dict[str, Distances]
    as_configured: tuple[Distances, Distances | None] | None
    """Logits, and all gradients, of the model as it is trained: layers scanned or recomputed. None = it has neither."""


class Comparison:
    """A model and what it reads. Its parts (forward, gradients, updates, decoding) are functions of this."""

    def __init__(
        self, cfg: ModelConfig, params: Params, batches: Batches, with_grads: bool, reference: Reference = TorchNetwork
    ) -> None:
        self.asked_cfg, self.asked_params = cfg, params
        self.batches, self.with_grads = batches, with_grads
        # Captures do not see inside a scan or a recomputed layer, and cuDNN has no float64: the same function without.
        impl = "auto" if cfg.attention_impl == "cudnn" else cfg.attention_impl
        self.cfg = dataclasses.replace(cfg, scan_layers=False, remat=False, attention_impl=impl)
        self.params = jax.tree.map(np.asarray, unstack_params(cfg, params) if cfg.scan_layers else params)
        self.networks = Networks(self.cfg, self.params, reference)
        self.against_torchref = reference is TorchNetwork
        self._draws: list[Draw] = []

    def row(self, quantity: str, name: str, draws: Sequence[Distances], scale: float = 0.0) -> Row:
        """Judges a quantity in the config's type."""
        return judge(quantity, name, draws, self.cfg.dtype, scale)

    def event_rows(self, quantity: str, values: list[dict[Event, Distances]]) -> list[tuple[Event, Row]]:
        """Judges every event, given the distances by event of each draw."""
        return [(event, self.row(quantity, _row_name(event), [draw[event] for draw in values])) for event in values[0]]

    def draws(self, count: int) -> list[Draw]:
        """What the networks compute from the first `count` batches, each batch once."""
        for batch in self.batches.first(count)[len(self._draws) :]:
            self._draws.append(self._drawn(batch))
        return self._draws[:count]

    def _drawn(self, batch: Inputs) -> Draw:
        passes = self.networks.run(functools.partial(_forward, batch=batch, with_grads=self.with_grads))
        configured = None
        if self.asked_cfg.scan_layers or self.asked_cfg.remat:
            configured = self._as_configured(batch, passes)
        return Draw(
            value_distances(passes.map(lambda one: one.values)),
            distances(passes.map(lambda one: one.logits)),
            distances(passes.map(lambda one: one.loss)),
            distances(passes.map(lambda one: one.plain_loss)),
            {path: distances(pick(passes.map(lambda one: one.grads), path)) for path in passes.jax.grads},
            configured,
        )

    def _as_configured(self, batch: Inputs, passes: Results) -> tuple[Distances, Distances | None]:
        cfg = self.asked_cfg
        with computing(cfg.dtype):
            asked = self._network_as_configured.forward(batch.windows, batch.weights, self.with_grads)
        grads = None
        if self.with_grads:
            tree = unflatten_dict(asked.grads, sep="/")
            in_jax = concatenated(flatten_dict(unstack_params(cfg, tree) if cfg.scan_layers else tree, sep="/"))
            grads = distances(beside(in_jax, passes.map(lambda one: concatenated(one.grads))))
        return distances(beside(asked.logits, passes.map(lambda one: one.logits))), grads

    @functools.cached_property
    def _network_as_configured(self) -> JaxNetwork:
        return JaxNetwork(self.asked_cfg, self.asked_params)

    def settled(
        self,
        part: Callable[["Comparison", int], PartResult],
        start: int | None = None,
        more: Sequence[int] | None = None,
    ) -> PartResult:
        """Compares a part on `start` batches (None = draws), and on more random ones while nothing but rounding fails.

        Rounding errors have long tails: an RMS over one text, one position or one loss says little, for a few large
        errors make it up. A bug needs no second look, float64 shows it.
        """
        # A batch for bfloat16 has so many tokens that few of them suffice.
        more = more or MORE
        for times in more[:2] if self.cfg.dtype == "bfloat16" else more:
            result = part(self, times * (start or self.batches.draws))
            if result.divergence is None or result.divergence.verdict == "DIFFERS":
                break
        return result

    @property
    def capacity(self) -> int:
        """Of the caches compared: one that overflows, where positions can go on past it and the reference can, too."""
        if self.cfg.has_position_table:
            return self.cfg.max_seq_len
        length = self.batches.length
        return max(2, 2 * length // 3) if self.against_torchref else length + GREEDY_TOKENS


def value_distances(values: Results) -> dict[Event, Distances]:
    """The distances of every event that both have, in JAX's order."""
    return {event: distances(pick(values, event)) for event in values.jax if event in values.torch}


def beside(in_jax: np.ndarray, others: Results) -> Results:
    """A result of JAX in the compared type beside those of the reference."""
    return Results(in_jax, others.torch, None, others.torch_float64)


def concatenated(leaves: dict[str, np.ndarray]) -> np.ndarray:
    """All values one after another, sorted by path."""
    return np.concatenate([np.asarray(leaves[path]).reshape(-1) for path in sorted(leaves)])


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


def _forward(network: Network, batch: Inputs, with_grads: bool) -> Pass:
    return network.forward(batch.windows, batch.weights, with_grads)
