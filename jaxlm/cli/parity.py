"""`jaxlm parity`: a run, a preset or any config, computed in JAX and in PyTorch with the same weights."""

import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.options import CheckpointOptions, asks_help, first_word, of_kinds, parse_options, print_json
from jaxlm.config import ModelConfig, presets
from jaxlm.config.base import check_at_least, check_seed, to_dict
from jaxlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from jaxlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ParityOptions(CheckpointOptions):
    text: str | None = None
    """A text to compare on, by the run's tokenizer; default: random tokens."""
    prompt: str | None = None
    """A text that greedy sampling continues in both; default: the beginning of what is compared on."""
    seed: int = 0
    """Of the random tokens and weights."""
    draws: int = 3
    """Batches of random tokens over which rounding is averaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ConfigOptions(_ParityOptions):
    model: ModelConfig
    preset: str = "nanogpt-cpu"
    """Whose config the --model options change, with fresh parameters."""


@dataclasses.dataclass(frozen=True)
class _PresetOption:
    preset: str = "nanogpt-cpu"


def parity(arguments: list[str]) -> int:
    """The table on stdout, or one JSON object; 1 where the two differ by more than rounding."""
    word, rest = first_word(arguments)
    options: Any
    if word is not None:
        options = parse_options(_ParityOptions, rest, "parity RUN", _ParityOptions())
        name, config = word, None
    else:
        usage = "parity [RUN]"
        name = _PresetOption().preset
        if not asks_help(rest):
            name = parse_options(_PresetOption, rest, usage, _PresetOption(), others=True).preset
        base = of_kinds(presets.preset(name), rest, usage)
        options = parse_options(_ConfigOptions, rest, usage, _ConfigOptions(model=base.model, preset=name))
        config = options.model
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
