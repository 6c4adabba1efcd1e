"""`jaxlm info`: what a model costs; versions, devices and whether the compiler computes right."""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.cli.options import Given, JsonOption, parse_options, with_kinds
from jaxlm.cli.output import print_json, print_table
from jaxlm.config import ExperimentConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, presets
from jaxlm.config.base import to_dict
from jaxlm.errors import CheckError, UserError

_TARGET = tyro.conf.arg(
    metavar="[PRESET|RUN]",
    help=f"Model to describe: the folder of a run, or one of {', '.join(presets.PRESETS)}. Without one: "
    "versions, devices and whether the compiler computes right.",
    help_behavior_hint="",
)
_COSTS = {
    "parameters": "in all",
    "forward_flops_per_token": "matrix products of a forward pass; training takes about 3 times as many",
    "cache_bytes_per_token": "by which a row's cache grows until its windows are full",
    "cache_bytes": "a row's cache for {} tokens",
    "activation_bytes_per_sequence": "kept for the backward pass for each {} tokens (estimate)",
}
"""What each number means; {} is the context."""
_MEMORY = {
    "step_peak": "of the compiled training loop: arguments, results and temporaries",
    "step_must_live": "the sum of the next four",
    "parameters": "",
    "gradients": "",
    "optimizer_state": "",
    "activations": "kept of a micro-batch for its backward pass (estimate without dropout)",
    "written_in_place": "of the results: they take the place of the state before the step",
    "evaluation_peak": "of the compiled evaluation of a long split",
}
"""What each number of --memory means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InfoOptions(JsonOption):
    """Describe a model (parameters, FLOPs, memory) or, without one, the machine (versions, devices, the compiler)."""

    target: Annotated[tyro.conf.Positional[str | None], _TARGET] = None
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig
    memory: bool = False
    """Of a preset or a run: also compile training and evaluation, and say what memory they take."""
    fingerprint: bool = False
    """Train `tiny` for a few steps, sample from it, and print a hash of every number: equal on two machines means that
    they compute the same, to the last bit."""
    on: str | None = None
    """Of a preset or a run: plan a training step on the devices of --mesh.*, all of this kind: a100, h100, h200 or a
    TPU, v4, v5e, v5p, v6e. --mesh.* alone plans without times. No such device is needed."""


def info(arguments: list[str]) -> int:
    """`jaxlm info [PRESET|RUN]`: tables or JSON."""
    mesh_is_given = False

    def defaults(given: Given) -> _InfoOptions:
        nonlocal mesh_is_given
        mesh_is_given = bool(given["mesh"])
        return _defaults(given)

    options = parse_options(_InfoOptions, arguments, "info", defaults)
    planned = mesh_is_given or options.on is not None
    if options.fingerprint:
        if options.target is not None or options.memory or planned:
            other = options.target or ("--memory" if options.memory else "--on or --mesh")
            raise UserError(f"--fingerprint is of this machine, not of {other}: leave one out")
        return _show_fingerprint(options.json)
    if options.target is None:
        if options.memory or planned:
            option = "--memory" if options.memory else "--on" if options.on else "--mesh"
            raise UserError(f"{option} is of a preset or a run: give one, such as jaxlm info nanogpt-cpu {option}")
        return _describe_machine(options.json)
    if planned and options.memory:
        raise UserError("--memory compiles for this machine, --mesh and --on plan for others: give one of them")
    if not planned and not options.memory:
        return _describe_model(options.target, options.model, None, options.json)
    parts = {name: getattr(options, name) for name in ("model", "optim", "train", "mesh")}
    config = dataclasses.replace(_config(options.target), **parts)
    if not planned:
        return _describe_model(options.target, options.model, _memory(config), options.json)
    if options.mesh.coordinator is not None:
        raise UserError(f"mesh.coordinator = {options.mesh.coordinator!r} is for training: a plan needs no processes")
    from jaxlm.cli.plan import show_plan  # imports JAX

    return show_plan(options.target, config, options.on, options.json)


def _defaults(given: Given) -> _InfoOptions:
    """The options of the preset or run."""
    name = given.get("target")
    for part in ("model", "optim", "train"):
        if name is None and given[part]:
            raise UserError(f"--{part} options change a preset or a run: give one, such as jaxlm info nanogpt-cpu")
    base = with_kinds(_config(name or "nanogpt-cpu"), given)
    return _InfoOptions(model=base.model, optim=base.optim, train=base.train, mesh=base.mesh)


def _config(name: str) -> ExperimentConfig:
    """The configuration of a preset or a run."""
    if name in presets.PRESETS:
        return presets.preset(name)
    if not Path(name).exists():
        raise UserError(
            f"{name!r} is neither a preset nor a run: choose one of {', '.join(presets.PRESETS)}, or a folder"
        )
    from jaxlm.run import checkpoint
    from jaxlm.run.folder import read_config

    config = read_config(Path(name))
    with contextlib.suppress(CheckError):  # what is damaged is said where its weights are needed
        checkpoint.check_layers(Path(name) / "checkpoints", config.model)
    return config


def _describe_machine(as_json: bool) -> int:
    """Versions, devices, and how many of the canary's programs the compiler gets right."""
    from jaxlm.compilation_cache import kept, kept_programs
    from jaxlm.ops.canary import run_programs
    from jaxlm.run.folder import provenance

    with kept_programs():
        versions, outcomes = provenance(), run_programs()
    cache = kept()
    wrong = [outcome for outcome in outcomes if not outcome.right]
    if as_json:
        programs = [outcome._asdict() for outcome in outcomes]
        compiler = {"right": not wrong, "programs": programs}
        print_json({**versions, "compiler": compiler, "compiled_programs": cache._asdict()})
        return 1 if wrong else 0
    rows = [[package, version] for package, version in versions["versions"].items()]
    device = versions["device"]
    rows.append(["device", f"{device['count']} x {device['kind']} ({device['platform']})"])
    if cache.folder is not None:
        limit = "no limit" if cache.max_bytes is None else f"at most {cache.max_bytes / 1e6:,.1f} MB"
        rows.append(["compiled programs", f"{cache.programs:,} in {cache.bytes / 1e6:,.1f} MB ({limit})"])
    rows.append(["kept in", cache.folder or "not kept"])
    print_table("jaxlm", ["what", "value"], rows)
    print(f"compiler: {len(outcomes) - len(wrong)} of {len(outcomes)} programs right")
    for outcome in wrong:
        print(f"compiler: {outcome.name} is wrong by {outcome.error:.1e} of its largest value")
    return 1 if wrong else 0


def _show_fingerprint(as_json: bool) -> int:
    """The hash of what this machine computes, and of its parts."""
    from jaxlm.compilation_cache import kept_programs
    from jaxlm.run.fingerprint import fingerprint

    with kept_programs():
        found = fingerprint()
    if as_json:
        print_json(found)
        return 0
    values, settings = found["values"], found["settings"]
    device = settings["device"]
    rows = [[name, value[:16]] for name, value in found["parts"].items()]
    rows.append(["loss", f"{values['first_loss']!r} to {values['last_loss']!r}"])
    rows += [[f"{name} tokens", " ".join(map(str, values[name]))] for name in ("greedy", "sample")]
    rows.append(["device", f"{device['count']} x {device['kind']} ({device['platform']})"])
    rows.append(["processor", settings["processor"]])
    rows += [[name, settings["versions"][name]] for name in ("jaxlm", "jax", "jaxlib", "flax", "optax")]
    rows += [["XLA_FLAGS", settings["xla_flags"] or "none"], ["products", str(settings["matmul_precision"])]]
    print_table("what this machine computes", ["part", "sha256, first 16 digits, or value"], rows)
    print(f"fingerprint: {found['fingerprint']}")
    return 0


def _memory(config: ExperimentConfig) -> dict[str, int]:
    """What training takes, in bytes, by the keys of _MEMORY."""
    from jaxlm.analysis.memory import training_memory
    from jaxlm.compilation_cache import kept_programs

    with kept_programs():
        found = training_memory(config)
    return {
        "step_peak": found.step.peak,
        "step_must_live": found.must_live,
        "parameters": found.parameters,
        "gradients": found.gradients,
        "optimizer_state": found.optimizer_state,
        "activations": found.activations,
        "written_in_place": found.step.aliased,
        "evaluation_peak": found.evaluation.peak,
    }


def _describe_model(name: str, model: ModelConfig, memory: dict[str, int] | None, as_json: bool) -> int:
    """What a model costs, then its parameters."""
    from jaxlm.analysis import costs  # imports JAX
    from jaxlm.model.build import build_model
    from jaxlm.model.transformer import attention_implementations

    table = costs.parameter_table(model)
    numbers = {
        "parameters": sum(count for _, _, count in table),
        "forward_flops_per_token": round(costs.forward_flops_per_token(model)),
        "cache_bytes_per_token": costs.cache_bytes_per_token(model),
        "cache_bytes": costs.cache_bytes(model, model.max_seq_len),
        "activation_bytes_per_sequence": costs.activation_bytes_per_sequence(model),
    }
    states = costs.optimizer_bytes(model)
    buildable = dataclasses.replace(model, attention_impl="auto") if model.attention_impl == "cudnn" else model
    attention = attention_implementations(build_model(buildable), model.max_seq_len)
    if as_json:
        report: dict[str, Any] = {"name": name, "model": to_dict(model), **numbers, "optimizer_state_bytes": states}
        report |= {} if memory is None else {"memory_bytes": memory}
        report["attention"] = attention
        print_json({**report, "shapes": {path: list(shape) for path, shape, _ in table}})
        return 0
    rows = [[key, f"{value:,}", _COSTS[key].format(model.max_seq_len)] for key, value in numbers.items()]
    if attention:
        used = ", ".join(dict.fromkeys(attention))
        rows.append(["attention", used, f"implementation for {model.max_seq_len} tokens on this machine"])
    print_table(name, ["what", "value", "meaning"], rows)
    if memory is not None:
        rows = [[key, f"{value:,}", _MEMORY[key]] for key, value in memory.items()]
        print_table(f"{name}, memory of training without the text", ["what", "bytes", "meaning"], rows)
    rows = [[key, f"{value:,}", f"{value / states['adamw']:.1%}"] for key, value in states.items()]
    print_table(name, ["optimizer", "bytes of its state", "of AdamW's"], rows)
    print_table(name, ["parameter", "shape", "count"], fold_blocks(table))
    return 0


def fold_blocks(table: list[tuple[str, tuple[int, ...], int]]) -> list[list[str]]:
    """The rows to print of a parameter table: what is alike in several blocks stands once, under a row that names them.

    Of 12 blocks, block_0/mlp/up/kernel to block_11/mlp/up/kernel become one row, "  mlp/up/kernel", under the row
    "block_0 … block_11, each".
    """
    numbers: dict[tuple[str, str, str, str], list[int]] = {}
    for path, shape, count in table:
        prefix, number, rest = re.fullmatch(r"(?:(.*?_)(\d+)/)?(.*)", path).groups()  # type: ignore[union-attr]
        row = prefix or "", rest, " x ".join(map(str, shape)), f"{count:,}"
        numbers.setdefault(row, []).extend([] if number is None else [int(number)])
    rows: list[list[str]] = []
    for heading, group in itertools.groupby(numbers, lambda row: _name_blocks(row[0], numbers[row])):
        if heading:
            rows.append([heading, "", ""])
        rows += [[f"  {rest}" if heading else rest, shape, count] for _, rest, shape, count in group]
    return rows


def _name_blocks(prefix: str, numbers: list[int]) -> str:
    """block_0 … block_11, each; "" for what belongs to no block."""
    if not numbers:
        return ""
    first, last = min(numbers), max(numbers)
    if len(numbers) > 2 and len(numbers) == last - first + 1:
        return f"{prefix}{first} … {prefix}{last}, each"
    return ", ".join(f"{prefix}{number}" for number in sorted(numbers)) + (", each" if len(numbers) > 1 else "")
