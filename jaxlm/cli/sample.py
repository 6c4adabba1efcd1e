"""`jaxlm sample` and `jaxlm eval`: what the command draws from a run, and what it measures on one."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxlm.cli.options import CheckpointOptions, asks_help, parse_options, print_json, read_text, run_word
from jaxlm.config import SampleConfig
from jaxlm.config.base import to_dict
from jaxlm.errors import UserError

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True)
class _PromptOption:
    prompt: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleOptions(CheckpointOptions):
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")]
    prompt_file: str | None = None
    """UTF-8 file whose text the samples continue, in place of --prompt; - is stdin."""


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
    from jaxlm.run.samples import draw, keep

    with kept_programs():
        from jaxlm.run.folder import load_run

        loaded = load_run(path, options.step)
        drawn = draw(loaded, cfg, None if options.json or cfg.num_samples > 1 else _show)
    whole = [cfg.prompt + one.text for one in drawn]
    found = {
        "run": str(path),
        "step": loaded.step,
        "sample": to_dict(cfg),
        "texts": whole,
        "samples": [dataclasses.asdict(one) for one in drawn],
    }
    if options.json:
        print_json(found)
    else:
        print("" if cfg.num_samples == 1 else "\n---\n".join(whole))
    kept = keep(loaded, cfg.seed, found)
    if kept is not None:
        print(f"kept: {kept}", file=sys.stderr)
    return 0


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
