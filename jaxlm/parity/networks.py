"""One network in both frameworks, seen under the same names."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import by_path, to_array
from jaxlm.convert.torchref import jax_name, to_torchref, torch_name, turned
from jaxlm.model.build import build_model
from jaxlm.ops.loss import cross_entropy
from jaxlm.parity.capture import Event, hooked, traced
from jaxlm.parity.measure import Pair
from jaxlm.types import Params

Values = dict[Event, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a network computes from a batch: its layers' values, logits, losses, and by path the weighted gradients."""

    values: Values
    logits: np.ndarray
    loss: np.ndarray
    plain_loss: np.ndarray
    """Without weights."""
    grads: dict[str, np.ndarray]


class Ours:
    """The network in JAX, products at the highest precision."""

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        self.cfg = cfg
        self.params = jax.tree.map(jnp.asarray, params)
        self.model = build_model(cfg)
        self.apply = jax.jit(traced(self._logits))
        self._pass = jax.jit(self._loss_and_grads, static_argnames="with_grads")

    def _logits(self, params: Params, tokens: Any, cache: Any = None) -> Any:
        return self.model.apply({"params": params}, tokens, cache=cache)

    def _loss_and_grads(self, params: Params, windows: Any, weights: Any, with_grads: bool) -> Any:
        def loss(params: Params) -> Any:
            (logits, _), trace = traced(self._logits)(params, windows[:, :-1])
            plain = cross_entropy(logits, windows[:, 1:])
            return cross_entropy(logits, windows[:, 1:], weights), (logits, trace, plain)

        return jax.value_and_grad(loss, has_aux=True)(params) if with_grads else (loss(params), {})

    def forward(self, windows: np.ndarray, weights: np.ndarray, with_grads: bool = True) -> Pass:
        """On token windows [B, T + 1] whose targets have the weights [B, T]."""
        dtype = jnp.promote_types(self.cfg.dtype, jnp.float32)
        result = self._pass(self.params, windows, weights.astype(dtype), with_grads=with_grads)
        (loss, (logits, trace, plain)), grads = result
        found = {path: np.asarray(grad) for path, grad in by_path(grads).items()}
        return Pass(trace.by_event(), np.asarray(logits), np.asarray(loss), np.asarray(plain), found)

    def decode(self, chunks: Sequence[np.ndarray]) -> list[tuple[Values, np.ndarray]]:
        """Values and logits of chunks of tokens [B, T], one after another through a cache of max_seq_len tokens."""
        cache, results = self.model.init_cache(len(chunks[0]), self.cfg.max_seq_len), []
        for chunk in chunks:
            (logits, cache), trace = self.apply(self.params, chunk, cache)
            results.append((trace.by_event(), np.asarray(logits)))
        return results


class Theirs:
    """The network in torch, on the CPU, its layers under jaxlm's names."""

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        import torchref

        self.cfg, self.paths = cfg, list(by_path(params))
        self.model = torchref.build_model(cfg).eval()
        self.model.load_state_dict(to_torchref(cfg, params), strict=True)

    def forward(self, windows: np.ndarray, weights: np.ndarray, with_grads: bool = True) -> Pass:
        """As `Ours.forward`."""
        import torch

        import torchref

        tokens = torch.from_numpy(windows.astype(np.int64))
        with torch.set_grad_enabled(with_grads), hooked(self.model) as seen:
            logits = self.model(tokens[:, :-1])
            loss = torchref.cross_entropy(logits, tokens[:, 1:], torch.from_numpy(weights))
            plain = torchref.cross_entropy(logits, tokens[:, 1:])
        grads = {}
        if with_grads:
            self.model.zero_grad()
            loss.backward()
            for path in self.paths:
                parameter = self.model.get_parameter(torch_name(path))
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                grads[path] = turned(path, to_array(grad))
        return Pass(_renamed(seen), to_array(logits), to_array(loss), to_array(plain), grads)

    def decode(self, chunks: Sequence[np.ndarray]) -> list[tuple[Values, np.ndarray]]:
        """As `Ours.decode`."""
        import torch

        results = []
        self.model.clear_cache()
        with torch.no_grad():
            for chunk in chunks:
                with hooked(self.model) as seen:
                    logits = self.model(torch.from_numpy(chunk.astype(np.int64)), use_kv_cache=True)
                results.append((_renamed(seen), to_array(logits)))
        self.model.clear_cache()
        return results


class Networks:
    """One model four times: in jaxlm and torchref, in the config's type and, unless that is it, in float64."""

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        exact = dataclasses.replace(cfg, dtype="float64", param_dtype="float64")
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        with computing(cfg.dtype):
            ours, theirs = Ours(cfg, params), Theirs(cfg, params)
        with computing("float64"):
            more = (None, None) if cfg == exact else (Ours(exact, wide), Theirs(exact, wide))
        self.networks = Pair(ours, theirs, *more)

    def run(self, function: Callable[[Any], Any]) -> Pair:
        """What a function makes of each."""

        def computed(network: Ours | Theirs) -> Any:
            with computing(network.cfg.dtype):
                return function(network)

        return self.networks.map(computed)


def _renamed(seen: Values) -> Values:
    return {event._replace(layer=jax_name(event.layer)): value for event, value in seen.items()}


@contextlib.contextmanager
def computing(dtype: str) -> Iterator[None]:
    """Products at the highest precision, and 64-bit JAX where the type needs it."""
    with (
        jax.default_matmul_precision("highest"),
        jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")),
    ):
        yield
