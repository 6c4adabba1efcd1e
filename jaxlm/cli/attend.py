"""`jaxlm attend`: a picture of the attention maps."""

import dataclasses
from pathlib import Path

from jaxlm.cli.options import CheckpointOptions, RunArgument, parse_options
from jaxlm.cli.output import print_json
from jaxlm.errors import UserError
from jaxlm.terminal import for_stdout


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AttendOptions(CheckpointOptions):
    """Draw the attention maps of every layer and head over a text."""

    run: RunArgument
    """Folder of the run."""
    text: str
    """The text whose tokens attend to one another."""
    out: Path | None = None
    """Picture to write, in the format of its suffix; None = attention.png in the run's folder."""


def attend(arguments: list[str]) -> int:
    """`jaxlm attend RUN --text TEXT`: writes the picture and says where."""
    options = parse_options(_AttendOptions, arguments, "attend")
    path = options.run

    from jaxlm.compilation_cache import kept_programs
    from jaxlm.run.attention_maps import draw_attention
    from jaxlm.run.folder import load_run
    from jaxlm.run.own_files import own_problem

    out = options.out or path / "attention.png"
    if options.out is None and (problem := own_problem(out)):
        raise UserError(f"{out} {problem}, or give --out")
    with kept_programs():
        loaded = load_run(path, options.step)
        maps = draw_attention(loaded, options.text, out)
    if options.json:
        print_json({"run": str(path), "step": loaded.step, "out": str(out), "maps": [list(m.shape) for m in maps]})
    else:
        print(for_stdout(f"{out}: {len(maps)} layers of {len(maps[0])} maps, step {loaded.step}"))
    return 0
