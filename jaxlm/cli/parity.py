"""`jaxlm parity`: a run, a preset or any config, computed in JAX and in PyTorch with the same weights."""

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
    """Compare a model with PyTorch, layer by layer: a run, or --preset with the --model options."""

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]", help_behavior_hint="")] = None
    """Folder of the run. Without one: fresh parameters for --preset and the --model options."""
    preset: str = "nanogpt-cpu"
    """Whose config the --model options change, with fresh parameters."""
    model: ModelConfig
    text: str | None = None
    """Text to compare on, by the run's tokenizer; None = random tokens."""
    prompt: str | None = None
    """Text that greedy sampling continues in both; None = the beginning of what is compared on."""
    seed: int = 0
    """Seed of the random tokens and parameters."""
    draws: int = 3
    """Batches of random tokens over which rounding is averaged."""


def parity(arguments: list[str]) -> int:
    """The table on stdout, or one JSON object; 1 where the two differ by more than rounding."""
    options = parse_options(_ParityOptions, arguments, "parity", _defaults)
    name, config = (options.preset, options.model) if options.run is None else (str(options.run), None)
    check_seed(options)
    check_at_least(options, 1, "draws")
    if config is not None and (options.step, options.text, options.prompt) != (None, None, None):
        raise UserError("--step, --text and --prompt need a run, whose weights and tokenizer they are for: give RUN")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("parity needs PyTorch, which is missing: pip install 'jaxlm[parity]'") from None
    from jaxlm.cli.compilation_cache import kept_programs
    from jaxlm.parity import check, random_params
    from jaxlm.run.folder import load_run, provenance

    with kept_programs():
        tokens = prompt = None
        if config is None:
            run = load_run(Path(name), options.step)
            config, params, name = run.config.model, run.params, f"{name}, step {run.step}"
            tokens, prompt = (_ids(getattr(options, which), run.tokenizer, which) for which in ("text", "prompt"))
        else:
            params = random_params(config, options.seed)
        found = provenance()
        device = found["device"]
        where = {
            "backend": device["platform"],
            "device": device["kind"],
            "torch_device": "cpu",
            "jax": found["versions"]["jax"],
            "torch": importlib.metadata.version("torch"),
            "precision": "highest",
            "dtype": config.dtype,
        }
        print(f"comparing {name}: compiling takes most of the time", file=sys.stderr)
        report = check(config, params, tokens, prompt=prompt, seed=options.seed, draws=options.draws)
    if options.json:
        print_json({"model": name, "config": to_dict(config), **where, **report.to_dict()})
    else:
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in where.items())}\n{report}")
    return 0 if report.passed else 1


def _ids(text: str | None, tokenizer: "Tokenizer", name: str) -> "np.ndarray | None":
    """A text as one row of ids."""
    from jaxlm.data.tokenizer import prompt_ids

    return None if text is None else prompt_ids(text, tokenizer, name)[None]


def _defaults(given: Given) -> _ParityOptions:
    """The options of the preset. A run has a model of its own."""
    if "run" in given and ("preset" in given or given["model"]):
        name = "--preset" if "preset" in given else f"--model.{next(iter(given['model']))}".replace("_", "-")
        raise UserError(
            f"{name} is for a model with fresh parameters, and {given['run']} is a run: leave one of them out"
        )
    base = with_kinds(presets.preset(given.get("preset", "nanogpt-cpu")), given)
    return _ParityOptions(model=base.model)
