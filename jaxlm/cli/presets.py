"""`jaxlm presets`: the named configurations."""

from jaxlm.cli.options import (
    JsonOption,
    parse_options,
    print_json,
    print_table,
)
from jaxlm.config.base import to_dict
from jaxlm.config.presets import PRESETS, describe, preset


def presets(arguments: list[str]) -> int:
    """`jaxlm presets`: a table or JSON."""
    options = parse_options(JsonOption, arguments, "presets", JsonOption())
    made = {name: preset(name) for name in PRESETS}
    if options.json:
        print_json({name: to_dict(config) for name, config in made.items()})
    else:
        rows = [
            [name, f"L {c.num_layers}, D {c.embed_dim}, N {c.num_heads}, T {c.max_seq_len}", describe(name)]
            for name, c in ((name, config.model) for name, config in made.items())
        ]
        print_table("presets", ["name", "size", "what it is"], rows)
    return 0
