"""`jaxlm parity`: compares a run, a preset or any config in JAX and in PyTorch, with the same weights."""

import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxlm.cli.options import CheckpointOptions, Given, parse_options, with_kinds
from jaxlm.cli.output import print_json
from jaxlm.config import ModelConfig, presets
from jaxlm.config.base import check_at_least, check_seed, to_dict
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from jaxlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ParityOptions(CheckpointOptions):
    """Compare a model in JAX and in PyTorch: layers, logits, loss, gradients, optimizer updates and cached decoding.

    Float64 decides what is a bug; in the model's own type only rounding may differ. Exit code 1: they differ.
    """

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")] = None
    """Folder of the run. Without one: random weights for --preset and the --model options."""
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
    """Batches of random tokens over which rounding is averaged. None = 3; for bfloat16 1, of 4,096 tokens."""


def parity(arguments: list[str]) -> int:
    """Prints a table or one JSON object; returns 1 if the two differ by more than admissible rounding."""
    options = parse_options(_ParityOptions, arguments, "parity", _defaults)
    name, config = (options.preset, options.model) if options.run is None else (str(options.run), None)
    check_seed(options)
    if options.draws is not None:
        check_at_least(options, 1, "draws")
    if config is not None and (options.step, options.text, options.prompt) != (None, None, None):
        raise UserError("--step, --text and --prompt need the weights and tokenizer of a run: give RUN")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("parity needs PyTorch, which is missing: pip install 'jaxlm[parity]'") from None
    from jaxlm.compilation_cache import kept_programs
    from jaxlm.parity import check, random_params
    from jaxlm.parity.compiler import compare_compiler
    from jaxlm.parity.report import PartResult, joined
    from jaxlm.run.folder import load_run, provenance

    with kept_programs():
        tokens = prompt = None
        if config is None:
            run = load_run(Path(name), options.step)
            config, params, name = run.config.model, run.params, f"{name}, step {run.step}"
            tokens, prompt = (_ids(getattr(options, which), run.tokenizer, which) for which in ("text", "prompt"))
        else:
            params = random_params(config, options.seed)
        origin = provenance()
        device = origin["device"]
        where = {
            "backend": device["platform"],
            "device": device["kind"],
            "torch_device": "cpu",
            "jax": origin["versions"]["jax"],
            "torch": importlib.metadata.version("torch"),
            "precision": "highest",
            "dtype": config.dtype,
        }
        print(f"comparing {name}: compiling takes most of the time", file=sys.stderr)
        compiler = compare_compiler()
        model = check(config, params, tokens, prompt=prompt, seed=options.seed, draws=options.draws)
        report = joined([compiler, PartResult(list(model.rows), model.first)])
    if options.json:
        print_json({"model": name, "config": to_dict(config), **where, **report.to_dict()})
    else:
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in where.items())}\n{report}")
    return 0 if report.passed else 1


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
    """The options of the preset. A run has a model of its own."""
    if "run" in given and ("preset" in given or given["model"]):
        name = "--preset" if "preset" in given else f"--model.{next(iter(given['model']))}".replace("_", "-")
        raise UserError(
            f"{name} is for a model with fresh parameters, and {given['run']} is a run: leave one of them out"
        )
    base = with_kinds(presets.preset(given.get("preset", "nanogpt-cpu")), given)
    return _ParityOptions(model=base.model)
