"""What a family of models is: the fields of its config.json and the names of its tensors, in both directions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax.traverse_util import flatten_dict

from jaxlm.config import ModelConfig
from jaxlm.convert.foreign import Fields
from jaxlm.convert.layouts import Entry, Layout, Shape
from jaxlm.model.build import build_model, init_params

QKV = ("attention/query", "attention/key", "attention/value")
"""The projections that some families keep in one tensor."""


@runtime_checkable
class Field(Protocol):
    """One entry of config.json, or several that belong together."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """The fields of ModelConfig that it gives."""

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """The entries of config.json that describe this model, as well as they can."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers.

    A table reads like the config.json and the tensors that it describes: their names on the left, ours on the right.
    """

    model_type: str
    architecture: str
    """The class with the language model's head."""
    always: Mapping[str, Any]
    """Fields of ModelConfig that every model of the family has."""
    fields: tuple[Field, ...]
    top: Mapping[str, str]
    """Modules outside the layers."""
    layer: str
    """Name of a layer, with {} for its number."""
    block: Mapping[str, str | tuple[str, ...]]
    """Modules inside a layer; a tuple of ours = side by side in one tensor, in this order."""
    attention: str = "self_attn"
    mlp: str = "mlp"
    base: str = "model."
    """The prefix of all names but the head's, which a file without a head may lack."""
    plain: tuple[str, ...] = ()
    """Parts of the names of linear modules whose weights are (in, out), like our kernels."""
    by_heads: bool = False
    """Whether tensors that hold several parameters hold them head by head."""
    buffers: str = r"rotary_emb\.inv_freq"
    """Pattern for the ends of names of tensors that are not parameters."""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names under which files have a module."""
    zero_biases: bool = False
    """Whether biases that the family has and a model has not are written as zeros."""

    @property
    def head(self) -> str:
        """The module of the vocabulary head."""
        return next(name for name, ours in self.top.items() if ours == "head")

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """The fields of ModelConfig that a config.json describes."""
        values = dict(self.always)
        for field in self.fields:
            values |= field.read(fields)
        return values

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """The config.json of a model, as far as the family can describe it."""
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            values |= field.write(cfg)
        return values | {"dtype": cfg.param_dtype}

    def entries(self, cfg: ModelConfig) -> list[Entry]:
        """The tensors of a model, each with the parameters that it holds; together they hold every one once."""
        leaves: dict[str, list[str]] = {}
        for path in shapes(cfg):
            module, _, leaf = path.rpartition("/")
            leaves.setdefault(module, []).append(leaf)
        found = []
        for parts, name in self._modules(cfg, set(leaves)):
            for leaf in sorted(leaves[parts[0]]) if parts[0] in leaves else [""]:
                paths = tuple(f"{part}/{leaf}" if leaf else part for part in parts)
                turned = leaf == "kernel" and not any(part in name for part in self.plain)
                heads = cfg.num_heads if self.by_heads and len(parts) > 1 else None
                found.append(Entry(f"{name}.{'bias' if leaf == 'bias' else 'weight'}", paths, Layout(turned, heads)))
        return found

    def modules(self, cfg: ModelConfig) -> dict[str, str]:
        """The modules of transformers that compute the same as ours, by our paths; "" is the whole model."""
        pairs = {"": ""}
        known = {path.rpartition("/")[0] for path in shapes(cfg)}
        pairs |= {parts[0]: name for parts, name in self._modules(cfg, known) if len(parts) == 1 and parts[0] in known}
        pairs["head"] = self.head
        for i in range(cfg.num_layers):
            layer = self.layer.format(i)
            pairs |= {f"block_{i}": layer, f"block_{i}/attention": f"{layer}.{self.attention}"}
            pairs[f"block_{i}/mlp"] = f"{layer}.{self.mlp}"
        return pairs

    def _modules(self, cfg: ModelConfig, known: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
        """(our modules or tables, their module) for all that the model has."""
        tables = {path for path in shapes(cfg) if "/" not in path}
        for name, ours in self.top.items():
            if ours in known | tables:
                yield (ours,), name
        for i in range(cfg.num_layers):
            for name, part in self.block.items():
                parts = tuple(f"block_{i}/{one}" for one in (part if isinstance(part, tuple) else (part,)))
                if parts[0] in known:
                    yield parts, f"{self.layer.format(i)}.{name}"


def shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """The shape of each parameter of a model, by its path, without stacked layers."""
    model = build_model(dataclasses.replace(cfg, scan_layers=False, attention_impl="auto"))
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
