"""The entries of config.json that most families share, each read and written by one small class."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.convert.foreign import Fields

REQUIRED = object()
"""The default of an entry that must be there."""

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu"}
ACTIVATIONS |= {"relu": "relu", "silu": "silu", "swish": "silu"}
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"}
GATES |= {"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
"""Names of activations in transformers, and ours; of several with one meaning the first is written."""


class Same:
    """An entry that is a field of ModelConfig, or several, under another name.

    Args:
      theirs: its name in config.json.
      ours: names of the fields; none = the same name.
      default: its value where config.json lacks it; REQUIRED = it must be there.
      alias: another name for the same entry.
    """

    def __init__(self, theirs: str, *ours: str, default: Any = REQUIRED, alias: str | None = None) -> None:
        self.theirs, self.ours, self.default, self.alias = theirs, ours or (theirs,), default, alias

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        other = None if self.alias is None else fields.optional(self.alias, None)
        if other is not None:
            value = fields.optional(self.theirs, other)
            if value != other:
                fields.refuse(str(self.alias), other, f"{self.theirs} = {value!r} means the same: make them equal")
            return dict.fromkeys(self.ours, other)
        needed = self.default is REQUIRED
        value = fields.required(self.theirs) if needed else fields.optional(self.theirs, self.default)
        return dict.fromkeys(self.ours, value)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: resolved(cfg, self.ours[0])}


class Rate(Same):
    """A dropout rate; null means 0."""

    def __init__(self, theirs: str) -> None:
        super().__init__(theirs, default=0.0)

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        return {name: value or 0.0 for name, value in super().read(fields).items()}


class Choice:
    """An entry whose values have other names here."""

    def __init__(self, theirs: str, ours: str, default: Any, names: Mapping[Any, Any]) -> None:
        self.theirs, self.ours, self.default, self.names = theirs, ours, default, names

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        return {self.ours: fields.translated(self.theirs, self.default, self.names)}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        value = getattr(cfg, self.ours)
        return {self.theirs: next((name for name, ours in self.names.items() if ours == value), self.default)}


class Fixed:
    """An entry that must have one of these values; the first is written."""

    def __init__(self, theirs: str, *accepted: Any, written: bool = True) -> None:
        self.theirs, self.accepted, self.written = theirs, accepted, written

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        fields.only(self.theirs, *self.accepted)
        return {}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: self.accepted[0]} if self.written else {}


class Computed:
    """A field that follows from an entry by a formula; the entry may have a field of its own too.

    Args:
      to_ours: the field's value, from the entry's.
      to_theirs: the entry's value, from the config.
      default: the entry's value where config.json lacks it.
    """

    def __init__(
        self,
        theirs: str,
        ours: str,
        to_ours: Callable[[Any], Any],
        to_theirs: Callable[[ModelConfig], Any],
        default: Any = None,
    ) -> None:
        self.theirs, self.ours, self.default = theirs, ours, default
        self.to_ours, self.to_theirs = to_ours, to_theirs

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        value = fields.seen(self.theirs, self.default)
        fields.ignore([self.theirs])
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            fields.refuse(self.theirs, value, "give a number above 0")
        return {self.ours: self.to_ours(value)}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: self.to_theirs(cfg)}


class HeadWidth:
    """`head_dim` of families whose heads are as wide as the model over their number: another value is refused."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        width, sizes = (
            fields.optional("head_dim", None),
            [fields.seen("hidden_size"), fields.seen("num_attention_heads")],
        )
        if width is not None and (
            not all(isinstance(n, int) and n > 0 for n in sizes) or width != sizes[0] // sizes[1]
        ):
            fields.refuse("head_dim", width, "here heads are hidden_size / num_attention_heads wide; leave it out")
        return {}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {}


class Dropouts:
    """The rate after each sublayer, that of the embedding, and that of the attention weights.

    jaxlm has one rate for sublayers and embedding. Where they differ the sublayers' is taken, with a warning: only
    training knows the difference.
    """

    def __init__(self, residual: str, embedding: str | None, attention: str, default: float = 0.0) -> None:
        self.residual, self.embedding, self.attention, self.default = residual, embedding, attention, default

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        rate = fields.optional(self.residual, self.default)
        if self.embedding:
            other = fields.optional(self.embedding, self.default)
            if other != rate:
                warnings.warn(
                    f"{self.embedding} = {other!r} is read as {self.residual} = {rate!r}: jaxlm has one dropout rate "
                    "for the embedding and the sublayers; only training uses it",
                    stacklevel=4,
                )
        return {"dropout": rate or 0.0, "attention_dropout": fields.optional(self.attention, self.default) or 0.0}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        names = [self.residual, *([self.embedding] if self.embedding else [])]
        return {**dict.fromkeys(names, cfg.dropout), self.attention: cfg.attention_dropout}


class Window:
    """`sliding_window`: one window for all layers, or none."""

    def __init__(self, default: int | None = None) -> None:
        self.default = default

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        return {"window": fields.optional("sliding_window", self.default)}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {"sliding_window": shortest_period(cfg.layer_windows)[0]}


class LayerTypes:
    """`layer_types`: which layers have the window `sliding_window`.

    Args:
      pattern: whether a layer (counted from 0) has a window where layer_types is missing, given the value of `name`.
      name: an entry that `pattern` needs, and its default.
      used: an entry that switches all windows off if it is false.
    """

    FULL, SLIDING = "full_attention", "sliding_attention"

    def __init__(
        self,
        pattern: Callable[[int, Any], bool],
        name: tuple[str, Any] | None = None,
        size: int | None = None,
        used: str | None = None,
    ) -> None:
        self.pattern, self.name, self.size, self.used = pattern, name, size, used

    def types(self, fields: Fields) -> list[str]:
        """The type of each layer."""
        given, count = fields.seen("layer_types"), fields.seen("num_hidden_layers")
        if given is None and isinstance(count, int):
            option = None if self.name is None else fields.seen(*self.name)
            given = [self.SLIDING if self.pattern(i, option) else self.FULL for i in range(count)]
        known = (self.FULL, self.SLIDING)
        if not isinstance(given, list) or len(given) != count or any(one not in known for one in given):
            fields.refuse("layer_types", given, f"give one of {', '.join(known)} for each of the {count} layers")
        return given

    def read(self, fields: Fields) -> dict[str, Any]:
        """See Field."""
        types = self.types(fields)
        size = fields.optional("sliding_window", self.size)
        fields.ignore(["layer_types", *([self.name[0]] if self.name else [])])
        if self.used is not None and not fields.optional(self.used, False):
            size = None
        return {"window": scalar(shortest_period([size if one == self.SLIDING else None for one in types]))}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """See Field."""
        windows = cfg.layer_windows
        size = next((window for window in windows if window is not None), None)
        types = [self.FULL if window is None else self.SLIDING for window in windows]
        if self.used is None:  # transformers needs a number even if no layer has a window
            return {"sliding_window": size or cfg.max_seq_len, "layer_types": types}
        return {"sliding_window": size, "layer_types": types, self.used: size is not None}


def resolved(cfg: ModelConfig, name: str) -> Any:
    """A field of a config, as a number where None stands for one."""
    value = getattr(cfg, name)
    if value is not None:
        return value
    if name in cfg.resolved._fields:
        return getattr(cfg.resolved, name)
    if name == "attention_scale":
        return cfg.resolved.head_dim**-0.5
    return cfg.use_bias if name.endswith("_bias") else value


def shortest_period(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest tuple that gives these values when it is cycled."""
    for length in range(1, len(values) + 1):
        if all(value == values[i % length] for i, value in enumerate(values)):
            return tuple(values[:length])
    return tuple(values)


def scalar(period: tuple[Any, ...]) -> Any:
    """The only value of a period, or else the tuple."""
    return period[0] if len(period) == 1 else period
