"""One network in both frameworks, its layers under the same names."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxlm.config import ModelConfig
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.convert.torchref import jax_name, module_name, to_torchref, torch_name, turned
from jaxlm.decode.generate import generate
from jaxlm.model.build import build_model
from jaxlm.model.cache import KVCache
from jaxlm.ops.loss import cross_entropy
from jaxlm.parity.capture import Event, hooked, traced
from jaxlm.parity.measure import Results
from jaxlm.sharding.layout import put_params
from jaxlm.types import Params

Values = dict[Event, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a network computes from a batch: its layers' values, logits, losses, and gradients by path."""

    values: Values
    logits: np.ndarray
    loss: np.ndarray
    plain_loss: np.ndarray
    """The loss without weights."""
    grads: dict[str, np.ndarray]
    """The gradients of `loss`; empty if they were not asked for."""


class JaxNetwork:
    """The network in JAX, with products at the highest precision; on a mesh in context it is split over that."""

    begins_anywhere = True

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        self.cfg = cfg
        self.model = build_model(cfg)
        self.params = put_params(self.model, jax.tree.map(jnp.asarray, params))
        self.apply = jax.jit(traced(self._logits))
        self._plain = jax.jit(self._logits)
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
        """Reads token windows [B, T + 1] whose targets have the weights [B, T]."""
        dtype = jnp.promote_types(self.cfg.dtype, jnp.float32)
        result = self._pass(self.params, windows, weights.astype(dtype), with_grads=with_grads)
        (loss, (logits, trace, plain)), grads = result
        by_path = {path: np.asarray(grad) for path, grad in flatten_dict(grads, sep="/").items()}
        return Pass(trace.by_event(), np.asarray(logits), np.asarray(loss), np.asarray(plain), by_path)

    def attention_weights(self, windows: np.ndarray) -> tuple[dict[str, np.ndarray], Values]:
        """Each attention layer's softmax [B, maps, T, T], by path, and the values of the pass that computed it.

        Only attention with a mask has whole rows of weights to show.
        """
        model = build_model(dataclasses.replace(self.cfg, attention_impl="reference"))

        def apply(params: Params, tokens: Any) -> Any:
            return model.apply({"params": params}, tokens, mutable=["intermediates"])[1].get("intermediates", {})

        # Allowed excess precision, XLA passes on values before they are rounded to bfloat16: not those captured.
        exactly_as_written = {"xla_allow_excess_precision": False}
        compiled = jax.jit(traced(apply), compiler_options=exactly_as_written)
        sown, trace = compiled(self.params, windows[:, :-1])
        suffix = "/attention_weights"
        weights = {
            path.removesuffix(suffix): np.asarray(leaf).reshape(len(windows), -1, *leaf.shape[-2:])
            for path, (leaf,) in flatten_dict(sown, sep="/").items()
            if path.endswith(suffix)
        }
        return weights, trace.by_event()

    def decode(self, chunks: Sequence[np.ndarray], capacity: int) -> Iterator[tuple[Values, np.ndarray]]:
        """Reads chunks of tokens [B, T] one after another through a cache of this capacity: values and logits of each.

        Past the capacity the model computes as if no window were wider than that.
        """
        cache = self.model.init_cache(len(chunks[0]), capacity)
        for chunk in chunks:
            (logits, cache), trace = self.apply(self.params, chunk, cache)
            yield trace.by_event(), np.asarray(logits)

    def greedy(self, prompt: np.ndarray, new: int, capacity: int) -> np.ndarray:
        """The most likely continuation [B, new] of prompts [B, P], through such a cache."""
        options: dict[str, Any] = {"max_new_tokens": new, "temperature": 0.0, "capacity": capacity}
        result = generate(self.model, self.params, prompt.astype(np.int32), key=jax.random.key(0), **options)
        return np.asarray(result.tokens)

    def logits(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The logits [B, T, V] of tokens [B, T] that stand at the positions from `first` on, and see no others."""
        cache = None
        if first:
            cache = self.model.init_cache(len(tokens), tokens.shape[1])
            cache = cast(KVCache, cache)._replace(next_position=jnp.full(len(tokens), first, jnp.int32))
        return np.asarray(self._plain(self.params, tokens, cache)[0])


class TorchNetwork:
    """The network in torch, on the CPU, its layers under jaxlm's names."""

    begins_anywhere = True

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        import torchref

        self.cfg, self.paths = cfg, list(flatten_dict(params, sep="/"))
        self.model = torchref.build_model(cfg).eval()
        self.model.load_state_dict(to_torchref(cfg, params), strict=True)

    def forward(self, windows: np.ndarray, weights: np.ndarray, with_grads: bool = True) -> Pass:
        """The same as `JaxNetwork.forward`."""
        import torch

        import torchref

        tokens = to_tensor(windows).long()
        with torch.set_grad_enabled(with_grads), hooked(self.model) as values:
            logits = self.model(tokens[:, :-1])
            loss = torchref.cross_entropy(logits, tokens[:, 1:], to_tensor(weights))
            plain = torchref.cross_entropy(logits, tokens[:, 1:])
        grads = {}
        if with_grads:
            self.model.zero_grad()
            loss.backward()
            for path in self.paths:
                parameter = self.model.get_parameter(torch_name(path))
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                grads[path] = turned(path, to_array(grad))
        return Pass(_renamed(values), to_array(logits), to_array(loss), to_array(plain), grads)

    def attention_weights(self, windows: np.ndarray, values: Values) -> dict[str, np.ndarray]:
        """As `JaxNetwork.attention_weights`, from queries and keys that are given: the rest is torch's own.

        So both softmaxes have the same inputs, and only their own rounding is between them.

        Args:
          values: of another network; its queries, keys and what their norms return replace torch's.
        """
        import torch

        weights: dict[str, np.ndarray] = {}
        handles = []
        for event, value in values.items():
            layer, _, last = event.layer.rpartition("/")
            if event.side == "out" and layer.endswith("attention") and last.startswith(("query", "key")):
                module = self.model.get_submodule(module_name(event.layer))
                given = to_tensor(value)
                handles.append(module.register_forward_hook(lambda _, __, out, given=given: given.to(out.dtype)))
        for name, module in self.model.named_modules():
            if name.endswith(".softmax"):
                path = jax_name(name).removesuffix("/softmax")
                handles.append(
                    module.register_forward_hook(lambda _, __, out, path=path: weights.update({path: to_array(out)}))
                )
        try:
            with torch.no_grad():
                self.model(to_tensor(windows[:, :-1]).long())
        finally:
            for handle in handles:
                handle.remove()
        return weights

    def decode(self, chunks: Sequence[np.ndarray], capacity: int) -> Iterator[tuple[Values, np.ndarray]]:
        """The same as `JaxNetwork.decode`."""
        import torch

        model = self.with_capacity(capacity).model
        model.clear_cache()
        for chunk in chunks:
            with torch.no_grad(), hooked(model) as values:
                logits = model(to_tensor(chunk).long(), use_kv_cache=True)
            yield _renamed(values), to_array(logits)
        model.clear_cache()

    def greedy(self, prompt: np.ndarray, new: int, capacity: int) -> np.ndarray:
        """The same as `JaxNetwork.greedy`."""
        import torchref

        model = self.with_capacity(capacity).model
        return to_array(torchref.generate(model, to_tensor(prompt).long(), new, 0.0, use_kv_cache=True))

    def logits(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The same as `JaxNetwork.logits`."""
        import torch

        self.model.clear_cache()
        self.model.seen = first
        with torch.no_grad():
            logits = self.model(to_tensor(tokens).long(), use_kv_cache=True)
        self.model.clear_cache()
        return to_array(logits)

    def with_capacity(self, capacity: int) -> "TorchNetwork":
        """The network whose layers keep at most so many keys, with the same tensors as weights."""
        import torchref

        if capacity == self.cfg.max_seq_len:
            return self
        changes: dict[str, Any] = {"max_seq_len": capacity}
        if self.cfg.rope_scaling != "none":
            changes["rope_original_len"] = self.cfg.rope_original_len or self.cfg.max_seq_len
        network = copy.copy(self)
        network.cfg = dataclasses.replace(self.cfg, **changes)
        network.model = torchref.build_model(network.cfg).eval()
        network.model.load_state_dict(self.model.state_dict(), assign=True)
        return network


@runtime_checkable
class Network(Protocol):
    """What both sides of a comparison can do; `JaxNetwork` says it in full."""

    cfg: ModelConfig
    begins_anywhere: bool
    """Whether `logits` takes a `first` above 0."""

    def forward(self, windows: np.ndarray, weights: np.ndarray, with_grads: bool = True) -> Pass:
        """Layers, logits, losses and gradients of a batch."""

    def decode(self, chunks: Sequence[np.ndarray], capacity: int) -> Iterator[tuple[Values, np.ndarray]]:
        """Layers and logits of each chunk, read through a cache."""

    def greedy(self, prompt: np.ndarray, new: int, capacity: int) -> np.ndarray:
        """The most likely tokens, through a cache."""

    def logits(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """Logits alone."""


Reference = Callable[[ModelConfig, Params], Network]
"""Makes the network to compare with from a config, whose type it takes, and the parameters in that type."""


class Networks:
    """One model four times: in jaxlm and by a reference, in the config's type and, unless that is float64, in float64.

    The reference is torchref's model, unless another one is given.
    """

    def __init__(self, cfg: ModelConfig, params: Params, reference: Reference = TorchNetwork) -> None:
        exact = dataclasses.replace(cfg, dtype="float64", param_dtype="float64")
        with computing(cfg.dtype):
            in_type = JaxNetwork(cfg, params), reference(cfg, params)
        in_float64: tuple[Any, ...] = ()
        if cfg != exact:
            wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
            with computing("float64"):
                in_float64 = JaxNetwork(exact, wide), reference(exact, wide)
        self.each = Results(*in_type, *in_float64)

    def run(self, function: Callable[[Any], Any]) -> Results:
        """Calls a function with each network."""

        def computed(network: Network) -> Any:
            with computing(network.cfg.dtype):
                return function(network)

        return self.each.map(computed)

    def steps(self, function: Callable[[Network], Iterator[Any]]) -> Iterator[Results]:
        """Calls a function that yields, with each network: what all of them yield first, then second and so on."""
        iterators = self.each.map(lambda network: (network, function(network)))

        def advanced(pair: tuple[Network, Iterator[Any]]) -> Any:
            with computing(pair[0].cfg.dtype):
                return next(pair[1], None)

        while (step := iterators.map(advanced)).jax is not None:
            yield step


def _renamed(values: Values) -> Values:
    return {event._replace(layer=jax_name(event.layer)): value for event, value in values.items()}


@contextlib.contextmanager
def computing(dtype: str) -> Iterator[None]:
    """Products at the highest precision, and 64-bit JAX where the type needs it."""
    with (
        jax.default_matmul_precision("highest"),
        jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")),
    ):
        yield
