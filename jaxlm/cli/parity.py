"""`jaxlm parity`: compares a run, a preset or an imported model in JAX and in PyTorch, with the same weights."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from jaxlm.cli.options import CheckpointOptions, Given, MeshOption, parse_options, with_kinds
from jaxlm.cli.output import print_json, say
from jaxlm.config import ModelConfig, presets
from jaxlm.config.base import check_at_least, check_seed, to_dict
from jaxlm.errors import UserError
from jaxlm.terminal import printable

if TYPE_CHECKING:
    import numpy as np

    from jaxlm.data.tokenizer import Tokenizer
    from jaxlm.parity import Report
    from jaxlm.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ParityOptions(MeshOption, CheckpointOptions):
    """Compare a model in JAX and in PyTorch: layers, logits, loss, gradients, optimizer updates and cached decoding.

    Float64 decides what is a bug; in the model's own type only rounding may differ. Exit code 1: they differ.
    """

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN|DIR]", help_behavior_hint="")] = None
    """Folder of the run, or of the model that --reference imports. Without one: random weights for --preset and the
    --model options."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="{hf,nanogpt}")] = None
    """Compare the model that is imported from DIR with its own library's. hf: with transformers' module, DIR being a
    folder of Hugging Face; nanogpt: with the GPT class of DIR/model.py, whose code runs, for DIR/ckpt.pt."""
    preset: str = "nanogpt-cpu"
    """Preset whose config is compared, with the changes that --model options make to it."""
    model: ModelConfig
    text: str | None = None
    """Text that both read; it needs a RUN, whose tokenizer encodes it. None = random tokens."""
    prompt: str | None = None
    """Text that greedy sampling continues in both. None = the first half of the tokens read."""
    seed: int = 0
    """Seed of the random tokens, of the loss weights and, without a RUN, of the parameters."""
    draws: int | None = None
    """Batches of random tokens over which rounding is averaged. None = 3; for bfloat16 1, of 4,096 tokens; for large
    models 1, of a single row."""
    report: Path | None = None
    """Folder for the result as report.json and as a page, index.html."""


class _Compared(NamedTuple):
    """A model that was compared."""

    name: str
    config: ModelConfig
    params: "Params"
    report: "Report"


def parity(arguments: list[str]) -> int:
    """Prints a table or one JSON object; returns 1 if the two differ by more than admissible rounding."""
    options = parse_options(_ParityOptions, arguments, "parity", _defaults)
    check_seed(options)
    if options.draws is not None:
        check_at_least(options, 1, "draws")
    of_run = options.step, options.text, options.prompt
    if (options.run is None or options.reference is not None) and of_run != (None, None, None):
        raise UserError("--step, --text and --prompt need the weights and tokenizer of a run: give RUN")
    if options.reference is not None and options.run is None:
        raise UserError(f"--reference {options.reference} needs the folder of the model: give DIR")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("parity needs PyTorch, which is missing: pip install 'jaxlm[parity]'") from None
    from jaxlm.compilation_cache import kept_programs
    from jaxlm.parity.compiler import compare_compiler
    from jaxlm.parity.page import check_new_report, write_report
    from jaxlm.parity.report import PartResult, joined

    if options.report is not None:
        check_new_report(options.report)
    with kept_programs(), options.in_context():
        compared = _compared_source(options) if options.reference is not None else _compared_torchref(options)
        compiler = compare_compiler()
        report = joined([compiler, PartResult(list(compared.report.rows), compared.report.first)])
        where = _where(options, compared.config)
        if options.report is not None:
            write_report(options.report, compared.name, _facts(options, compared, where), report)
            say(f"wrote {options.report / 'index.html'} and report.json")
    if options.json:
        print_json({"model": compared.name, "config": to_dict(compared.config), **where, **report.to_dict()})
    else:
        print(printable(f"{compared.name}: {', '.join(f'{key} {value}' for key, value in where.items())}\n{report}"))
    return 0 if report.passed else 1


def _compared_torchref(options: _ParityOptions) -> _Compared:
    """A run, or a config with random parameters, against torchref."""
    from jaxlm.parity import check, random_params
    from jaxlm.run.folder import load_run

    name, config, tokens, prompt = options.preset, options.model, None, None
    if options.run is None:
        params = random_params(config, options.seed)
    else:
        run = load_run(options.run, options.step)
        config, params, name = run.config.model, run.params, f"{options.run}, step {run.step}"
        tokens, prompt = (_ids(getattr(options, which), run.tokenizer, which) for which in ("text", "prompt"))
    say(f"comparing {name}: compiling takes most of the time")
    report = check(config, params, tokens, prompt=prompt, seed=options.seed, draws=options.draws)
    return _Compared(name, config, params, report)


def _compared_source(options: _ParityOptions) -> _Compared:
    """An imported model against its own library's."""
    from jaxlm.parity.models import check_import
    from jaxlm.parity.source import REFERENCES, open_source

    reference, folder = options.reference, options.run
    assert reference is not None
    assert folder is not None
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        raise UserError(
            f"{folder} is a run of jaxlm: leave --reference out, or give the folder that it was imported from"
        )
    if reference == "nanogpt":
        say(f"importing {folder / 'model.py'}: its code runs")
    source = open_source(folder, reference)
    beside = REFERENCES[source.reference]
    say(f"comparing {folder} with {beside}: compiling takes most of the time")
    report = check_import(source, seed=options.seed, draws=options.draws)
    return _Compared(str(folder), source.cfg, source.params, report)


def _where(options: _ParityOptions, config: ModelConfig) -> dict[str, str]:
    """Devices, versions and the type of the comparison."""
    from jaxlm.run.folder import provenance

    origin = provenance()
    device = origin["device"]
    of_hf = options.reference == "hf"
    sizes = {axis: getattr(options.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    mesh = {} if set(sizes.values()) == {1} else {"mesh": " ".join(f"{axis}={n}" for axis, n in sizes.items())}
    library = {"transformers": importlib.metadata.version("transformers")} if of_hf else {}
    return {
        "backend": device["platform"],
        "device": device["kind"],
        **mesh,
        "torch_device": "cpu",
        "jax": origin["versions"]["jax"],
        "torch": importlib.metadata.version("torch"),
        **library,
        "precision": "highest",
        "dtype": config.dtype,
    }


def _facts(options: _ParityOptions, compared: _Compared, where: dict[str, str]) -> dict[str, Any]:
    """What the report says was compared."""
    from jaxlm.parity.source import REFERENCES, file_hashes
    from jaxlm.run.folder import provenance
    from jaxlm.run.init_from import params_sha256

    origin = provenance()
    beside: dict[str, Any] = {"reference": "torchref (jaxlm's models in plain PyTorch)", "files_sha256": {}}
    if options.reference is not None and options.run is not None:
        name: Any = options.reference
        beside = {"reference": REFERENCES[name], "files_sha256": file_hashes(options.run)}
    return {
        "model": compared.name,
        **beside,
        "parameters_sha256": params_sha256(compared.params),
        **where,
        "versions": origin["versions"],
        "git_commit": origin["git_commit"],
        "seed": options.seed,
        "config": to_dict(compared.config),
    }


def _ids(text: str | None, tokenizer: "Tokenizer", name: str) -> "np.ndarray | None":
    """Encodes a text as one row of ids."""
    from jaxlm.data.tokenizer import prompt_ids

    if text is None:
        return None
    ids = prompt_ids(text, tokenizer, name)
    if name == "text" and len(ids) < 3:
        raise UserError(f"text {text!r} has {len(ids)} token{'s' * (len(ids) > 1)}: give at least 3")
    return ids[None]


def _defaults(given: Given) -> _ParityOptions:
    """The options of the preset. A run or a folder of another library has a model of its own."""
    if "run" in given and ("preset" in given or given["model"]):
        name = "--preset" if "preset" in given else f"--model.{next(iter(given['model']))}".replace("_", "-")
        what = "a run" if given.get("reference") is None else "a model of another library"
        raise UserError(
            f"{name} is for a model with fresh parameters, and {given['run']} is {what}: leave one of them out"
        )
    base = with_kinds(presets.preset(given.get("preset", "nanogpt-cpu")), given)
    return _ParityOptions(model=base.model)
