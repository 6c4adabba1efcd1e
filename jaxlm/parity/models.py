"""A model with identical weights in jaxlm and torchref: all that they compute, and where they part first."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Integer

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import by_path, nested
from jaxlm.decode.generate import generate
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.parity import causes, updates
from jaxlm.parity.measure import Pair, Row, measure
from jaxlm.parity.networks import Networks, Ours, Pass, Theirs, Values, computing
from jaxlm.parity.report import Divergence, Report, first_divergence
from jaxlm.types import Params

Part = Literal["gradients", "updates", "decoding", "sampling"]
"""What is compared besides activations, logits and losses; sampling is greedy."""

LATER_TOKENS, GREEDY_TOKENS = 12, 12
"""Tokens read after the prefill, a chunk and then one by one; and tokens sampled."""

MORE = (1, 4, 16)
"""Times as many batches over which rounding errors are averaged, as long as they speak against a quantity."""

Found = tuple[list[Row], Divergence | None]


def check(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray | None = None,
    *,
    prompt: np.ndarray | None = None,
    seed: int = 0,
    draws: int = 3,
    parts: Collection[str] = get_args(Part),
) -> Report:
    """Compares `jaxlm.build_model(cfg)` with `torchref.build_model(cfg)` under the same parameters.

    Compared are the output of every layer, logits, loss (with weights), the gradient of every parameter, three steps
    of each optimizer from identical gradients, cached decoding past the wrap of its window, and greedy tokens: in
    float64, where only a different formula differs by more than 1e-10 of a tensor's largest value, and in the config's
    own type, where our rounding error may be twice torch's and 4 units in the last place. On failure the first layer
    to differ is named with likely causes, tried out where they can be. Products are taken at the highest precision.

    Args:
      tokens: token ids to read [B, T + 1], T >= 2; None = random ones, as many as the context or 131 and three windows.
      prompt: ids [B, P] that greedy sampling continues; None = the first half of the tokens.
      seed: of the random tokens and the weights of the loss.
      draws: batches over which rounding errors are averaged; 1 with tokens.

    Raises:
      UserError: parameters that are not the config's; tokens or a prompt that it cannot read.
    """
    if not {*parts} <= {*get_args(Part)}:
        raise UserError(f"parts = {tuple(parts)!r} holds an unknown one: choose among {', '.join(get_args(Part))}")
    if draws < 1:
        raise UserError(f"draws = {draws} is too small: give at least 1")
    if prompt is not None and (prompt.ndim != 2 or not prompt.size):
        raise UserError(f"prompt of shape {list(prompt.shape)} cannot be continued: give rows of ids, [B, P]")
    for path, leaf in by_path(params).items():
        if not np.isfinite(np.asarray(leaf, np.float64)).all():
            raise UserError(f"parameter {path} is not finite: a model that holds NaN or infinity cannot be compared")
    if prompt is not None and cfg.has_position_table and prompt.shape[1] >= cfg.max_seq_len:
        raise UserError(f"prompt has {prompt.shape[1]} tokens: give fewer than max_seq_len = {cfg.max_seq_len}")
    rng = np.random.default_rng(seed)
    batches = [_inputs(cfg, rng, tokens) for _ in range(1 if tokens is not None else draws)]
    return Comparison(cfg, params, batches, None if tokens is not None else rng, prompt).report(parts)


def random_params(cfg: ModelConfig, seed: int = 0) -> Params:
    """Parameters under which every part of a model matters: scaled by their inputs, biases and norms drawn as well."""
    with computing(cfg.dtype):
        params = init_params(build_model(dataclasses.replace(cfg, init="torch")), jax.random.key(seed))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))

        def drawn(leaf: jax.Array, key: jax.Array) -> jax.Array:
            return leaf if leaf.std() > 0 else leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)

        return jax.tree.unflatten(tree, [drawn(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Token windows [B, T + 1] and the weights [B, T] of their targets, float64."""

    windows: Integer[np.ndarray, "B T1"]
    weights: np.ndarray


def _inputs(cfg: ModelConfig, rng: np.random.Generator, tokens: np.ndarray | None) -> Inputs:
    if tokens is None:
        if cfg.max_seq_len < 2:
            raise UserError(f"max_seq_len = {cfg.max_seq_len} leaves nothing to compare: give at least 2")
        widest = max((window or 0 for window in cfg.layer_windows), default=0)
        length = min(max(128, 3 * widest) + 3, cfg.max_seq_len)  # local attention begins at 128, 3 windows
        windows = rng.integers(0, cfg.vocab_size, (3, length + 1))
    else:
        windows = np.asarray(tokens)
    read = windows.shape[-1] - 1
    sound = windows.ndim == 2 and windows.size and np.issubdtype(windows.dtype, np.integer)
    if not sound or read < 2 or not 0 <= windows.min() <= windows.max() < cfg.vocab_size:
        raise UserError(
            f"tokens {list(windows.shape)} cannot be compared: give 3 or more ids below {cfg.vocab_size} a row"
        )
    if cfg.has_position_table and read > cfg.max_seq_len:
        raise UserError(f"{read} tokens are beyond the learned position table, max_seq_len = {cfg.max_seq_len}")
    weights = rng.uniform(0.5, 1.5, (len(windows), read))
    weights[-1, -(read // 3) - 1 :] = 0  # padding
    return Inputs(windows.astype(np.int32), weights)


class Comparison:
    """The parts of `check`."""

    def __init__(
        self, cfg: ModelConfig, params: Params, batches: list[Inputs], rng: np.random.Generator | None, prompt: Any
    ) -> None:
        self.asked_cfg, self.asked_params, self.batches, self.rng, self.prompt = cfg, params, batches, rng, prompt
        impl = "auto" if cfg.attention_impl == "cudnn" else cfg.attention_impl
        self.cfg = dataclasses.replace(cfg, scan_layers=False, remat=False, attention_impl=impl)
        self.params = jax.tree.map(np.asarray, unstack_params(cfg, params) if cfg.scan_layers else params)
        self.networks = Networks(self.cfg, self.params)
        self.given, self.may_draw = len(batches), rng is not None
        self.passed: list[Pair] = []
        self.with_grads = True

    def row(self, quantity: str, name: str, pairs: list[Pair], scale: float = 0.0) -> Row:
        """A row in the config's type."""
        return measure(quantity, name, pairs, self.cfg.dtype, scale)

    def report(self, parts: Collection[str]) -> Report:
        """All rows, and the first divergence in the order: layers, gradients, updates, decoding."""
        self.with_grads = "gradients" in parts or "updates" in parts
        found = [self._settled(self._forward)]
        if "gradients" in parts:
            found.append(self._settled(self._gradients))
        if "updates" in parts:
            found.append(self._updates(self._passes(1)[0]))
        if "decoding" in parts:
            found.append(self._settled(self._decoding))
        if "sampling" in parts:
            rows = self._greedy(self._cached.networks)
            found.append((rows, _first_row(rows)))
        every = tuple(row for part, _ in found for row in part)
        return Report(every, next((first for _, first in found if first), None))

    def _settled(self, part: Callable[[int], Found]) -> Found:
        """What a part finds in the batches: if those are random, in more, where nothing but rounding speaks against it.

        Rounding errors have long tails, and a few of them make up an RMS.
        """
        for times in MORE if self.may_draw else MORE[:1]:
            rows, first = part(times * self.given)
            if first is None or any(row.verdict == "DIFFERS" for row in rows):
                break
        return rows, first

    def _more(self, count: int) -> list[Inputs]:
        """So many batches, more random ones after the first."""
        shape = self.batches[0].windows.shape
        while self.rng is not None and len(self.batches) < count:
            tokens = self.rng.integers(0, self.cfg.vocab_size, shape)
            self.batches.append(_inputs(self.cfg, self.rng, tokens))
        return self.batches[:count]

    def _passes(self, count: int) -> list[Pair]:
        """What the networks compute from so many batches."""
        for batch in self._more(count)[len(self.passed) :]:
            self.passed.append(self.networks.run(functools.partial(_forward, batch=batch, with_grads=self.with_grads)))
        return self.passed[:count]

    def _forward(self, count: int) -> Found:
        passes = self._passes(count)
        values = [p.map(lambda one: one.values) for p in passes]
        events = [
            (event, self.row("activation", event.layer, [v.map(operator.itemgetter(event)) for v in values]))
            for event in values[0].ours
            if event in values[0].theirs
        ]
        rows = [row for event, row in events if event.side == "out" and event.layer]
        rows.append(self.row("logits", "", [p.map(lambda one: one.logits) for p in passes]))
        rows.append(self.row("loss", "weighted", [p.map(lambda one: one.loss) for p in passes]))
        rows.append(self.row("loss", "of all tokens", [p.map(lambda one: one.plain_loss) for p in passes]))
        if self.asked_cfg.scan_layers or self.asked_cfg.remat:
            rows += self._as_configured(passes)
        first = first_divergence("activation", events)
        if first is None:
            return rows, _first_row(rows)
        event, divergence = first
        found = causes.HINTS["rounding"]
        if dict(events)[event].verdict != "rounding":
            found = causes.of_layer(self.cfg, self.params, self.batches[0].windows, event, values[0].exact())
        return rows, dataclasses.replace(divergence, causes=found)

    def _as_configured(self, passes: list[Pair]) -> list[Row]:
        """Logits of the model as it is trained, and its gradients end to end."""
        cfg, what = self.asked_cfg, "layers scanned or recomputed"
        with computing(cfg.dtype):
            asked = Ours(cfg, self.asked_params)
            found = [
                asked.forward(batch.windows, batch.weights, bool(passes[0].theirs.grads)) for batch in self.batches
            ]
        theirs = [one.map(lambda side: side.logits) for one in passes]
        pairs = [Pair(a.logits, t.theirs, None, t.exact_theirs) for a, t in zip(found, theirs, strict=True)]
        rows = [self.row("logits", what, pairs)]
        if passes[0].theirs.grads:
            flat = [one.map(lambda side: _joined(side.grads)) for one in passes]
            ours = [
                _joined(by_path(unstack_params(cfg, nested(a.grads)) if cfg.scan_layers else a.grads)) for a in found
            ]
            pairs = [Pair(a, t.theirs, None, t.exact_theirs) for a, t in zip(ours, flat, strict=True)]
            rows.append(self.row("gradient", what, pairs))
        return rows

    def _gradients(self, count: int) -> Found:
        passes = self._passes(count)
        grads = [p.map(lambda one: one.grads) for p in passes]
        scale = max(float(np.max(np.abs(grad), initial=0)) for grad in grads[0].exact().values())
        rows = [
            self.row("gradient", path, [g.map(operator.itemgetter(path)) for g in grads], scale)
            for path in grads[0].ours
        ]
        ends = [event.layer for event in passes[0].ours.values if event.side == "out"]
        failed = [row for row in rows if not row.passed]
        if not failed:
            return rows, None
        last = max(failed, key=lambda row: ends.index(layer) if (layer := _layer_of(row.name)) in ends else -1)
        where = f"the gradient of {last.name} is the first of {len(failed)}, counted from the loss, to differ"
        return rows, Divergence("gradient", _layer_of(last.name), True, where, causes.of_gradient(last))

    def _updates(self, one: Pair) -> Found:
        grads = _of_norm(nested(one.theirs.grads), 1.5 * updates.CLIP_NORM)  # the second of STEPS is not clipped
        sizes = {path: float(np.max(np.abs(leaf), initial=0)) for path, leaf in by_path(self.params).items()}
        rows, first = [], None
        for name in updates.OPTIMIZERS:
            leaves = self.networks.run(lambda net, name=name: self._update(net, name, grads))  # type: ignore[misc]
            changes = {path: [leaves.map(operator.itemgetter(path))] for path in sizes}
            of_name = [
                measure("update", f"{name} {path}", change, self.cfg.dtype, unit=sizes[path])
                for path, change in changes.items()
            ]
            worst = max(of_name, key=lambda row: (not row.passed, row.float64_rel or row.max_rel))
            rows.append(worst)
            if not worst.passed and first is None:
                path = worst.name.split()[1]
                exact = self.networks.networks
                theirs = exact.theirs if exact.exact_theirs is None else exact.exact_theirs
                found = causes.of_update(worst, name, theirs, self.params, grads, leaves.exact()[path])
                where = f"the update of {path} by {name} differs, from identical parameters, state and gradients"
                first = Divergence("update", _layer_of(path), True, where, found)
        return rows, first

    def _update(self, network: Ours | Theirs, name: str, grads: Params) -> dict[str, np.ndarray]:
        """What an optimizer adds to the parameters, by path; in JAX to layers stacked as they are configured."""
        dtype = network.cfg.param_dtype
        params, slopes = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (self.params, grads))
        if isinstance(network, Theirs):
            return updates.torch_updates(name, network.cfg, params, slopes)
        if not self.asked_cfg.scan_layers:
            return updates.jax_updates(name, params, slopes)
        stacked = updates.jax_updates(name, *(stack_params(self.asked_cfg, tree) for tree in (params, slopes)))
        return by_path(unstack_params(self.asked_cfg, nested(stacked)))

    def _decoding(self, count: int) -> Found:
        """A prefill, a chunk and steps through the cache, past its capacity where that can be."""
        networks = self._cached
        capacity = networks.networks.ours.cfg.max_seq_len
        batches = self._more(count)
        read = batches[0].windows.shape[1] - 1
        after = min(read // 2, LATER_TOKENS)
        prefill = read - after
        begins = [0, prefill, *range(prefill + max(1, after // 2), read)]
        chunks = [np.split(batch.windows[:, :-1], begins[1:], axis=1) for batch in batches]
        results = [networks.run(functools.partial(_decode, chunks=one)) for one in chunks]
        rows = [
            self.row("decoding", f"prefill of {prefill}", [r.map(lambda parts: parts[0][1]) for r in results]),
            self.row(
                "decoding", f"{read - prefill} more, cache of {capacity}", [r.map(_stacked_steps) for r in results]
            ),
        ]
        if self.asked_cfg.scan_layers:
            rows.append(self._decoding_scanned(chunks, results, capacity))
        first = None
        for i, begin in enumerate(begins):
            values = [r.map(operator.itemgetter(i)).map(operator.itemgetter(0)) for r in results]
            events = [
                (event, self.row("decoding", event.layer, [v.map(operator.itemgetter(event)) for v in values]))
                for event in values[0].ours
                if event in values[0].theirs
            ]
            found = first_divergence("decoding", events)
            if found is not None:
                width = chunks[0][i].shape[1]
                what = f"the step at position {begin}" if width == 1 else f"{width} tokens from position {begin}"
                first = dataclasses.replace(
                    found[1], where=f"in {what}, {found[1].where}", causes=causes.HINTS["decoding"]
                )
                break
        return rows, first or _first_row(rows)

    def _decoding_scanned(self, chunks: list[list[np.ndarray]], results: list[Pair], capacity: int) -> Row:
        with computing(self.cfg.dtype):
            asked = Ours(dataclasses.replace(self.asked_cfg, max_seq_len=capacity), self.asked_params)
            found = [np.concatenate([logits for _, logits in asked.decode(one)], axis=1) for one in chunks]
        every = [r.map(lambda parts: np.concatenate([logits for _, logits in parts], axis=1)) for r in results]
        pairs = [Pair(ours, e.theirs, None, e.exact_theirs) for ours, e in zip(found, every, strict=True)]
        return self.row("decoding", "layers scanned", pairs)

    @functools.cached_property
    def _cached(self) -> Networks:
        """The networks with a capacity that is passed, where positions can go on."""
        cfg, read = self.cfg, self.batches[0].windows.shape[1] - 1
        if not cfg.has_position_table:
            cfg = dataclasses.replace(cfg, max_seq_len=max(2, 2 * read // 3))
        return Networks(cfg, self.params)

    def _greedy(self, networks: Pair) -> list[Row]:
        """Greedy tokens in float64, where near ties do not flip; none where a learned position table is full."""
        import torch

        import torchref

        ours, theirs = networks.exact(), networks.theirs if networks.exact_theirs is None else networks.exact_theirs
        tokens, new = self.batches[0].windows, GREEDY_TOKENS
        prompt = tokens[:, : tokens.shape[1] // 2] if self.prompt is None else self.prompt
        if self.cfg.has_position_table:
            new = min(new, self.cfg.max_seq_len - prompt.shape[1])
        if new < 1:
            return []
        with computing("float64"):
            drawn = generate(
                ours.model,
                ours.params,
                prompt.astype(np.int32),
                max_new_tokens=new,
                key=jax.random.key(0),
                temperature=0.0,
                capacity=ours.cfg.max_seq_len,
            ).tokens
        expected = torchref.generate(theirs.model, torch.from_numpy(prompt).long(), new, 0.0, use_kv_cache=True)
        pair = Pair(np.asarray(drawn), expected.numpy())
        return [measure("decoding", f"{new} greedy tokens", [pair], "float64")]


def _joined(leaves: dict[str, np.ndarray]) -> np.ndarray:
    """All values one after another, in the order of the paths."""
    return np.concatenate([np.asarray(leaves[path]).reshape(-1) for path in sorted(leaves)])


def _of_norm(tree: Params, norm: float) -> Params:
    """The tree scaled to a global norm; zeros stay zeros."""
    now = np.sqrt(sum(float(np.square(leaf.astype(np.float64)).sum()) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: (leaf * (norm / (now or 1.0))).astype(leaf.dtype), tree)


def _forward(network: Ours | Theirs, batch: Inputs, with_grads: bool) -> Pass:
    return network.forward(batch.windows, batch.weights, with_grads)


def _decode(network: Ours | Theirs, chunks: list[np.ndarray]) -> list[tuple[Values, np.ndarray]]:
    return network.decode(chunks)


def _stacked_steps(results: list[tuple[Values, np.ndarray]]) -> np.ndarray:
    return np.concatenate([logits for _, logits in results[1:]], axis=1)


def _layer_of(path: str) -> str:
    return path.rpartition("/")[0] or "embedding"


def _first_row(rows: list[Row]) -> Divergence | None:
    """A divergence that no layer explains."""
    failed = next((row for row in rows if not row.passed), None)
    if failed is None:
        return None
    kind = "rounding" if failed.verdict == "rounding" else failed.quantity
    return Divergence(failed.quantity, "model", True, f"{failed.quantity} {failed.name} differs", causes.HINTS[kind])
