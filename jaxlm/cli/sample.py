"""`jaxlm sample`: text from a run."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from jaxlm.cli.options import CheckpointOptions, Given, MeshOption, RunArgument, parse_options, read_text
from jaxlm.cli.output import print_json, say
from jaxlm.cli.streams import OutputError
from jaxlm.config import SampleConfig
from jaxlm.config.base import to_dict
from jaxlm.errors import ContextWarning, UserError
from jaxlm.terminal import for_stdout


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleOptions(MeshOption, CheckpointOptions):
    """Sample text from a run. Options that are not given are as the run's configuration has them."""

    run: RunArgument
    """Folder of the run."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")]
    prompt_file: str | None = None
    """UTF-8 file whose text the samples continue, instead of --prompt; - is stdin."""
    capacity: int | None = None
    """Tokens that each layer sees at most; None = prompt and new tokens, up to the context of the model. A model with
    rotary, sinusoidal or no positions can see more than it was trained with."""


def sample(arguments: list[str]) -> int:
    """`jaxlm sample RUN`: texts on stdout, one sample as it comes; a copy is kept in the run, whatever becomes of
    stdout.
    """
    own_length = False

    def defaults(given: Given) -> _SampleOptions:
        nonlocal own_length
        own_length = "max_new_tokens" in given.get("sample", {})
        return _defaults(given)

    options = parse_options(_SampleOptions, arguments, "sample", defaults)
    path, cfg = options.run, options.sample
    if options.prompt_file is not None:
        cfg = dataclasses.replace(cfg, prompt=read_text(options.prompt_file))
    from jaxlm.compilation_cache import kept_programs
    from jaxlm.run.samples import generate_samples, keep, prompt_fits

    with kept_programs(), options.in_context(), warnings.catch_warnings():
        from jaxlm.run.folder import load_run

        loaded = load_run(path, options.step)
        if not own_length and prompt_fits(loaded, cfg):  # the run's own length is not a choice to warn of
            warnings.simplefilter("ignore", ContextWarning)
        shown = _Shown()
        show = None if options.json or cfg.num_samples > 1 else shown.show
        samples = generate_samples(loaded, cfg, show, options.capacity)
    texts = [cfg.prompt + one.text for one in samples]
    report = {
        "run": str(path),
        "step": loaded.step,
        "sample": to_dict(cfg),
        **({} if options.capacity is None else {"capacity": options.capacity}),
        "texts": texts,
        "samples": [dataclasses.asdict(one) for one in samples],
    }
    kept = keep(loaded, cfg.seed, report)
    try:
        shown.check()
        if options.json:
            print_json(report)
        else:
            # a single text has been shown already
            print(for_stdout("" if cfg.num_samples == 1 else "\n---\n".join(texts)))
        sys.stdout.flush()
    finally:
        if kept is not None:
            say(f"kept: {kept}")
    return 0


class _Shown:
    """A sample on stdout as it comes. Where that cannot be written, the rest is not shown, but still sampled."""

    def __init__(self) -> None:
        self._error: OutputError | None = None

    def show(self, piece: str) -> None:
        """Prints a piece of text."""
        if self._error is None:
            try:
                print(for_stdout(piece), end="", flush=True)
            except OutputError as error:
                self._error = error

    def check(self) -> None:
        """Raises OutputError where a piece was not shown."""
        if self._error is not None:
            raise self._error


def _defaults(given: Given) -> _SampleOptions:
    """The options of the run's own configuration."""
    if "run" not in given:  # only for --help
        return _SampleOptions(run=Path(), sample=SampleConfig())
    prompt, file = given["sample"].get("prompt"), given.get("prompt_file")
    if None not in (prompt, file):
        raise UserError(f"--prompt {prompt!r} and --prompt-file {file!r} are both given: give one")
    from jaxlm.run.folder import read_config

    return _SampleOptions(run=given["run"], sample=read_config(given["run"]).sample)
