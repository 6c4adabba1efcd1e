"""`jaxlm presets`: the named configurations."""

import dataclasses

from jaxlm.cli.options import JsonOption, parse_options
from jaxlm.cli.output import print_json, print_table
from jaxlm.config.base import to_dict
from jaxlm.config.model import ModelConfig
from jaxlm.config.presets import PRESETS, describe, preset

_LETTERS = {"num_layers": "L", "embed_dim": "D", "num_heads": "N", "max_seq_len": "T", "vocab_size": "V"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PresetsOptions(JsonOption):
    """List the named configurations that `jaxlm train` and `jaxlm info` take."""


def presets(arguments: list[str]) -> int:
    """`jaxlm presets`: a table or JSON."""
    options = parse_options(_PresetsOptions, arguments, "presets")
    configs = {name: preset(name) for name in PRESETS}
    if options.json:
        print_json({name: to_dict(config) for name, config in configs.items()})
        return 0
    rows = [[name, sizes(config.model), describe(name)] for name, config in configs.items()]
    print_table("presets", ["name", "size", "what it is"], rows)
    print("L layers, D width, N heads, T tokens of context, V entries of the vocabulary")
    return 0


def sizes(model: ModelConfig) -> str:
    """The sizes that a model's family reads, such as "L 4, D 128, N 4, T 64, V 65"."""
    readers = {field.name: field.metadata.get("read_by", (model.family,)) for field in dataclasses.fields(model)}
    read = {name: letter for name, letter in _LETTERS.items() if model.family in readers[name]}
    return ", ".join(f"{letter} {getattr(model, name)}" for name, letter in read.items())
