"""`jaxlm info`: what a model costs; versions and devices."""

import dataclasses
from pathlib import Path

from jaxlm.cli.options import (
    JsonOption,
    first_word,
    of_kinds,
    parse_options,
    print_json,
    print_table,
)
from jaxlm.config import (
    ModelConfig,
    presets,
)
from jaxlm.config.base import to_dict
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InfoOptions(JsonOption):
    model: ModelConfig


def info(arguments: list[str]) -> int:
    """`jaxlm info [PRESET|RUN]`: tables or JSON."""
    name, rest = first_word(arguments)
    if name is None:
        options = parse_options(JsonOption, rest, "info", JsonOption())
        from jaxlm.run.folder import provenance

        found = provenance()
        if options.json:
            print_json(found)
        else:
            versions = [[package, version] for package, version in found["versions"].items()]
            device = " ".join(f"{key} {value}" for key, value in found["device"].items())
            print_table("jaxlm", ["what", "value"], [*versions, ["device", device]])
        return 0
    if name in presets.PRESETS:
        config = presets.preset(name)
    else:
        from jaxlm.run.folder import read_config

        if not Path(name).exists():
            raise UserError(
                f"{name!r} is neither a preset nor a run: choose one of {', '.join(presets.PRESETS)}, or a folder"
            )
        config = read_config(Path(name))
    model = of_kinds(config, rest, "info PRESET").model
    chosen = parse_options(_InfoOptions, rest, "info PRESET", _InfoOptions(model=model))
    from jaxlm.analysis.costs import (
        activation_bytes_per_sequence,
        cache_bytes,
        cache_bytes_per_token,
        forward_flops_per_token,
        optimizer_bytes,
        parameter_table,
    )

    model = chosen.model
    rows_by_name = parameter_table(model)
    costs = {
        "parameters": sum(row[-1] for row in rows_by_name),
        "forward_flops_per_token": round(forward_flops_per_token(model)),
        "cache_bytes_per_token": cache_bytes_per_token(model),
        "cache_bytes": cache_bytes(model, model.max_seq_len),
        "activation_bytes_per_sequence": activation_bytes_per_sequence(model),
    }
    states = optimizer_bytes(model)
    if chosen.json:
        shapes = {path: list(shape) for path, shape, _ in rows_by_name}
        print_json({"name": name, "model": to_dict(model), **costs, "optimizer_state_bytes": states, "shapes": shapes})
    else:
        rows = [[path, " x ".join(map(str, shape)), f"{count:,}"] for path, shape, count in rows_by_name]
        print_table(name, ["parameter", "shape", "count"], rows)
        context = f"{model.max_seq_len} tokens"
        meanings = {
            "parameters": "in all",
            "forward_flops_per_token": "matrix products of a forward pass; training takes about 3 times as many",
            "cache_bytes_per_token": "by which a row's cache grows until its windows are full",
            "cache_bytes": f"a row's cache for {context}",
            "activation_bytes_per_sequence": f"kept for the backward pass for each {context} (estimate)",
        }
        print_table(name, ["cost", "", "what"], [[k, f"{v:,}", meanings[k]] for k, v in costs.items()])
        rows = [[k, f"{v:,}", f"{v / states['adamw']:.1%}"] for k, v in states.items()]
        print_table(name, ["optimizer", "bytes of its state", "of AdamW's"], rows)
    return 0
