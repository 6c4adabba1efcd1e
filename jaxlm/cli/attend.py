"""`jaxlm attend`: a picture of the attention maps."""

import dataclasses
from pathlib import Path

from jaxlm.cli.options import (
    CheckpointOptions,
    parse_options,
    print_json,
    run_word,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AttendOptions(CheckpointOptions):
    text: str
    """The text whose tokens attend to one another."""
    out: Path | None = None
    """PNG to write; default: attention.png in the run's folder."""


def attend(arguments: list[str]) -> int:
    """`jaxlm attend RUN --text TEXT`: writes the picture, and says where."""
    path, rest = run_word(arguments, "attend")
    options = parse_options(_AttendOptions, rest, "attend RUN")

    from jaxlm.analysis.attention_maps import draw_attention
    from jaxlm.run.folder import load_run

    loaded = load_run(path, options.step)
    out = options.out or path / "attention.png"
    maps = draw_attention(loaded, options.text, out)
    if options.json:
        print_json({"run": str(path), "step": loaded.step, "out": str(out), "maps": [list(m.shape) for m in maps]})
    else:
        print(f"{out}: {len(maps)} layers of {len(maps[0])} maps, step {loaded.step}")
    return 0
