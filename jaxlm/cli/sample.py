"""`jaxlm sample`: texts from a run."""

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
class _GivenOptions:
    """Options whose presence matters, not only their value."""

    prompt: str | None = None
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleOptions(CheckpointOptions):
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")]
    prompt_file: str | None = None
    """UTF-8 file whose text the samples continue, instead of --prompt; - is stdin."""


def sample(arguments: list[str]) -> int:
    """`jaxlm sample RUN`: texts on stdout, a single one as its tokens come; a copy is kept in the run."""
    path, rest = run_word(arguments, "sample")
    if asks_help(rest):
        defaults = SampleConfig()
    else:
        from jaxlm.run.folder import read_config

        defaults = read_config(path).sample
    options = parse_options(_SampleOptions, rest, "sample RUN", _SampleOptions(sample=defaults))
    given = parse_options(_GivenOptions, rest, "sample RUN", _GivenOptions(), others=True)
    cfg = options.sample
    if options.prompt_file is not None:
        if given.prompt is not None:
            raise UserError(
                f"--prompt {given.prompt!r} and --prompt-file {options.prompt_file!r} are both given: give one"
            )
        cfg = dataclasses.replace(cfg, prompt=read_text(options.prompt_file))
    from jaxlm.cli.compilation_cache import kept_programs
    from jaxlm.run.samples import generate_samples, keep

    with kept_programs(), warnings.catch_warnings():
        from jaxlm.run.folder import load_run

        loaded = load_run(path, options.step)
        if given.max_new_tokens is None:  # a length that the user did not ask for needs no warning
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
