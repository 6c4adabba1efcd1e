"""`jaxlm sample`: text from a run."""

import dataclasses
import sys
import warnings
from typing import Annotated

import tyro

from jaxlm.cli.options import CheckpointOptions, asks_help, parse_options, print_json, read_text, run_word
from jaxlm.config import SampleConfig
from jaxlm.config.base import to_dict
from jaxlm.errors import PositionTableWarning, UserError


@dataclasses.dataclass(frozen=True)
class _PromptOption:
    prompt: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleOptions(CheckpointOptions):
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")]
    prompt_file: str | None = None
    """UTF-8 file whose text the samples continue, instead of --prompt; - is stdin."""


def sample(arguments: list[str]) -> int:
    """`jaxlm sample RUN`: texts on stdout, one sample as it comes; a copy is kept in the run."""
    path, rest = run_word(arguments, "sample")
    if asks_help(rest):
        defaults = SampleConfig()
    else:
        from jaxlm.run.folder import read_config

        defaults = read_config(path).sample
    options = parse_options(_SampleOptions, rest, "sample RUN", _SampleOptions(sample=defaults))
    cfg = options.sample
    if options.prompt_file is not None:
        prompt = parse_options(_PromptOption, rest, "sample RUN", _PromptOption(), others=True).prompt
        if prompt is not None:
            raise UserError(f"--prompt {prompt!r} and --prompt-file {options.prompt_file!r} are both given: give one")
        cfg = dataclasses.replace(cfg, prompt=read_text(options.prompt_file))
    from jaxlm.cli.compilation_cache import kept_programs
    from jaxlm.run.samples import generate_samples, keep

    with kept_programs(), warnings.catch_warnings():
        from jaxlm.run.folder import load_run

        loaded = load_run(path, options.step)
        if cfg.max_new_tokens == loaded.config.sample.max_new_tokens:  # not a length that the user has asked for
            warnings.simplefilter("ignore", PositionTableWarning)
        samples = generate_samples(loaded, cfg, None if options.json or cfg.num_samples > 1 else _show)
    texts = [cfg.prompt + one.text for one in samples]
    report = {
        "run": str(path),
        "step": loaded.step,
        "sample": to_dict(cfg),
        "texts": texts,
        "samples": [dataclasses.asdict(one) for one in samples],
    }
    if options.json:
        print_json(report)
    else:
        print("" if cfg.num_samples == 1 else "\n---\n".join(texts))  # a single text has been shown already
    kept = keep(loaded, cfg.seed, report)
    if kept is not None:
        print(f"kept: {kept}", file=sys.stderr)
    return 0


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
