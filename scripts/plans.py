"""Writes the plans of docs/scale.md from the numbers of `jaxlm info`.

python scripts/plans.py
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from jaxlm.analysis.accelerators import accelerator
from jaxlm.analysis.plan import make_plan
from jaxlm.cli.plan import plan_report
from jaxlm.config import presets

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
KINDS = "h100", "v5p"
AXES = "data", "fsdp", "tensor"

PLANS: dict[str, list[tuple[tuple[int, int, int], dict[str, Any]]]] = {
    "gpt2-124m": [
        ((8, 1, 1), {"train.batch_size": 512, "train.grad_accum": 4, "model.dtype": "bfloat16"}),
        ((64, 1, 1), {"train.batch_size": 512, "train.grad_accum": 1, "model.dtype": "bfloat16"}),
        ((512, 1, 1), {"train.batch_size": 512, "train.grad_accum": 1, "model.dtype": "bfloat16"}),
    ],
    "gpt3-xl": [
        ((1, 8, 1), {"train.grad_accum": 8}),
        ((8, 8, 1), {"train.grad_accum": 1}),
        ((64, 8, 1), {"train.grad_accum": 1}),
    ],
    "llama-7b": [
        ((1, 8, 1), {"train.grad_accum": 64}),
        ((1, 64, 1), {"train.grad_accum": 8}),
        ((1, 8, 8), {"train.grad_accum": 32}),
        ((8, 64, 1), {"train.grad_accum": 1}),
    ],
}
"""The meshes (data, fsdp, tensor) that each preset is planned for, and what else is changed."""


def command(name: str, mesh: tuple[int, int, int], options: dict[str, Any]) -> str:
    """The command that prints a plan."""
    sizes = [f"--mesh.{axis} {size}" for axis, size in zip(AXES, mesh, strict=True) if size > 1]
    others = [f"--{option.replace('_', '-')} {value}" for option, value in options.items()]
    return " ".join(["jaxlm info", name, *sizes, *others, "--on", KINDS[0]])


def row(name: str, mesh: tuple[int, int, int], options: dict[str, Any]) -> str:
    """The row of a table with the numbers of a plan."""
    config = presets.preset(name)
    for part in ("model", "train"):
        own = {key.split(".")[1]: value for key, value in options.items() if key.startswith(f"{part}.")}
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **own)})
    plan = make_plan(config, dict(zip(AXES, mesh, strict=True)))
    reports = [plan_report(config, plan, accelerator(kind)) for kind in KINDS]
    sent = ", ".join(f"{axes} {size / 1e9:.2f}" for axes, size in reports[0]["sent_bytes_by_axes"].items())
    cells = [
        f"{math.prod(mesh)}",
        " x ".join(map(str, mesh)),
        f"{config.train.grad_accum} x {plan.rows}",
        f"{plan.memory.total / 1e9:.1f}",
        sent,
    ]
    for report in reports:
        seconds, on = report["on"]["seconds"], report["on"]
        cells.append(f"{seconds['step_overlapped']:.3g} to {seconds['step_apart']:.3g}")
        cells.append(f"{on['mfu_overlapped']:.0%} to {on['mfu_apart']:.0%}")
    return f"| {' | '.join(cells)} |"


def table(name: str) -> str:
    """The commands of a preset, then the table of their numbers."""
    titles = [accelerator(kind).title for kind in KINDS]
    header = "| devices | data x fsdp x tensor | micro-batches x rows | memory, GB | sent a step, GB |"
    header += "".join(f" {title}: step, s | MFU |" for title in titles)
    lines = ["```", *(command(name, *plan) for plan in PLANS[name]), "```", "", header]
    lines += ["| ---: | --- | --- | ---: | --- |" + " ---: | ---: |" * len(titles)]
    return "\n".join([*lines, *(row(name, *plan) for plan in PLANS[name]), ""])


def marks(name: str) -> tuple[str, str]:
    """What stands before and after the table of a preset."""
    return f"<!-- {name}: python scripts/plans.py -->\n", f"<!-- end of {name} -->\n"


def shown(name: str) -> str:
    """The table of a preset as it stands on the page."""
    start, end = map(re.escape, marks(name))
    return re.search(f"{start}(.*?){end}", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]


if __name__ == "__main__":
    for preset in PLANS:
        page, (start, end) = PAGE.read_text(encoding="utf-8"), marks(preset)
        PAGE.write_text(page.replace(f"{start}{shown(preset)}{end}", f"{start}{table(preset)}{end}"), encoding="utf-8")
