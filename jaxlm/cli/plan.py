"""How `jaxlm info` shows a plan: what a training step takes on each device of a mesh, as tables or JSON."""

from typing import Any

from jaxlm.analysis.accelerators import Accelerator, accelerator
from jaxlm.analysis.mesh_traffic import sent_over
from jaxlm.analysis.plan import EFFICIENCY, Plan, changes_that_help, make_plan, planned_mesh, step_time, utilisation
from jaxlm.cli.output import print_json, print_table
from jaxlm.config import ExperimentConfig

_MEMORY = {
    "parameters": "",
    "gradients": "of a micro-batch",
    "gradient_totals": "sums over micro-batches",
    "optimizer_state": "",
    "weights_in_use": "as products read them: in their type, not split by fsdp",
    "activations": "kept of a micro-batch for its backward pass, without the logits (estimate)",
    "recomputed_layer": "with remat: kept of the layer that is computed again (estimate)",
    "logits": "kept of a micro-batch, with their gradient (estimate)",
}
"""What each part of the memory is."""


def show_plan(name: str, config: ExperimentConfig, on: str | None, as_json: bool) -> int:
    """Plans a training step on `config.mesh`, on the accelerator of this name if there is one."""
    plan = make_plan(config, planned_mesh(config.mesh))
    kind = None if on is None else accelerator(on)
    report = plan_report(config, plan, kind)
    if as_json:
        print_json({"name": name, "plan": report})
        return 0
    split = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = [
        ["devices", f"{plan.devices:,}", split],
        ["tokens a step", f"{plan.tokens:,}", f"{config.train.batch_size} rows of {config.model.max_seq_len}"],
        ["rows a device", f"{plan.rows:,}", f"of a micro-batch; {config.train.grad_accum} a step"],
        [
            "FLOPs a step",
            f"{report['flops']:.4g}",
            "of each device; with remat, layers count four times instead of three",
        ],
        [
            "cache of a row",
            _size(plan.cache),
            f"of each device, {config.model.max_seq_len} tokens; rows lie over data x fsdp",
        ],
    ]
    print_table(f"{name}, plan of a training step", ["what", "value", "meaning"], rows)
    memory = plan.memory
    rows = [[part, _size(getattr(memory, part)), meaning] for part, meaning in _MEMORY.items() if getattr(memory, part)]
    rows.append(["together", _size(memory.total), "at once; what XLA fuses takes less, its temporary arrays take more"])
    print_table("memory of each device", ["what", "size", "meaning"], rows)
    rows = [[term.name, term.axes, term.kind, _size(term.sent)] for term in plan.traffic]
    rows += [["together", axes, "", _size(sent)] for axes, sent in sent_over(plan.traffic).items()]
    if rows:
        print_table("sent by each device in a step, in rings", ["what", "over", "operation", "size"], rows)
    if kind is not None:
        _print_time(report, kind)
    return 0


def plan_report(config: ExperimentConfig, plan: Plan, on: Accelerator | None) -> dict[str, Any]:
    """The plan as what JSON holds: sizes in bytes, times in seconds."""
    report: dict[str, Any] = {
        "mesh": plan.mesh,
        "devices": plan.devices,
        "rows_a_device": plan.rows,
        "tokens_a_step": plan.tokens,
        "memory_bytes": {**plan.memory._asdict(), "total": plan.memory.total},
        "cache_bytes_per_row": plan.cache,
        "sent_bytes": [term._asdict() for term in plan.traffic],
        "sent_bytes_by_axes": sent_over(plan.traffic),
        "flops": plan.flops,
        "useful_flops_of_all_devices": round(plan.useful_flops),
    }
    if on is None:
        return report
    time, over = step_time(plan, config, on), plan.memory.total - on.memory
    report["on"] = {
        "accelerator": on.title,
        "memory_bytes": round(on.memory),
        "efficiency": EFFICIENCY,
        "seconds": {
            "compute": time.compute,
            "update": time.update,
            "communication": time.communication,
            "step_overlapped": time.overlapped,
            "step_apart": time.apart,
        },
        "mfu_overlapped": utilisation(plan, config, on, time.overlapped),
        "mfu_apart": utilisation(plan, config, on, time.apart),
        "fits": over <= 0,
        "bytes_too_many": max(0, round(over)),
        "sources": list(on.sources),
    }
    if over > 0:
        helps = changes_that_help(config, plan)
        report["on"]["what_helps"] = [
            {"change": change.what, "total": change.total, "fits": change.total <= on.memory} for change in helps
        ]
    return report


def _print_time(report: dict[str, Any], on: Accelerator) -> None:
    """How long a step takes, then whether it fits and, if not, what helps."""
    found, seconds = report["on"], report["on"]["seconds"]
    rows = [
        [
            "compute",
            _time(seconds["compute"]),
            f"at {EFFICIENCY:.0%} of the peak, as measured with gpt2-124m on one H200",
        ],
        ["update", _time(seconds["update"]), "gradients, parameters and state read, the last two written"],
        *(
            [f"sent over {axes}", _time(time), "at the full bandwidth of one direction"]
            for axes, time in seconds["communication"].items()
        ),
        [
            "step, overlapped",
            _time(seconds["step_overlapped"]),
            f"all is sent beside the products: MFU {found['mfu_overlapped']:.1%}",
        ],
        ["step, apart", _time(seconds["step_apart"]), f"nothing is: MFU {found['mfu_apart']:.1%}"],
    ]
    print_table(f"expected on {report['devices']:,} x {on.title}", ["what", "time", "meaning"], rows)
    total = report["memory_bytes"]["total"]
    if found["fits"]:
        print(f"fits: {_size(total)} of {_size(on.memory)} ({total / on.memory:.0%})")
        return
    print(f"does not fit: {_size(total)} of {_size(on.memory)}, {_size(found['bytes_too_many'])} too many")
    for change in found["what_helps"]:
        print(f"  {change['change']}: {_size(change['total'])}{', fits' if change['fits'] else ''}")


def _size(count: float) -> str:
    """12.34 GB; below a gigabyte 12.34 MB, below a megabyte in bytes."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count:,.0f} bytes"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{1e3 * seconds:,.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.2f} us"
